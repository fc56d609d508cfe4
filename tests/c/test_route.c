/* The route index: resolves as a naive search does, and keeps its cache small and right. */
#include "check.h"

#include <errno.h>
#include <time.h>

#include "nsn_route.h"
#include "nsn_subject.h"

static int add(struct nsn_routes *routes, uint32_t slot, uint32_t sid, const char *pattern, const char *queue)
{
    return nsn_routes_add(routes, (struct nsn_target){slot, 1, sid}, pattern, strlen(pattern), queue, strlen(queue));
}

static int take_out(struct nsn_routes *routes, uint32_t slot, uint32_t sid)
{
    return nsn_routes_remove(routes, (struct nsn_target){slot, 1, sid});
}

static const struct nsn_route *look(struct nsn_routes *routes, const char *subject)
{
    const struct nsn_route *route = nsn_routes_lookup(routes, subject, strlen(subject));
    CHECK(route);
    return route;
}

static uint32_t plain(struct nsn_routes *routes, const char *subject) { return look(routes, subject)->plain_count; }

TEST(matching_is_that_of_the_reference_table)
{
    const char *patterns[] = {"foo",     "foo.*", "foo.>", "*",   "*.*",    ">",      "fo*", "foo.*.baz",
                              "foo.b*", "*.>",   ">x",    "FOO", "foo.**", "foo.>>", "*foo"};
    const struct { const char *subject, *row; } table[] = {
        {"foo", "1..1.1........."},         {"foo.bar", ".11.11...1....."}, {"foo.bar.baz", "..1..1.1.1....."},
        {"fo*", "...1.11........"},         {"foo.b*", ".11.11..11....."},  {"foo.", "..............."},
        {"foo..", "..............."},       {"foo..bar", "..............."}, {".foo", "..............."},
        {".", "..............."},           {"foo.*", ".11.11...1....."},   {"foo.>", ".11.11...1....."},
        {"*", "...1.1........."},           {">", "...1.1........."},       {"foo.>.baz", "..1..1.1.1....."},
        {"FOO", "...1.1.....1..."},         {"", "..............."},
    };
    struct nsn_routes *routes = nsn_routes_new(0);
    for (uint32_t j = 0; j < 15; j++)
        CHECK_EQUAL(add(routes, 0, j, patterns[j], ""), 0);
    for (int pass = 0; pass < 2; pass++) /* resolved, then cached */
        for (size_t i = 0; i < sizeof(table) / sizeof(*table); i++) {
            char row[16] = "...............";
            const struct nsn_route *route = look(routes, table[i].subject);
            for (uint32_t k = 0; k < route->plain_count; k++)
                row[route->plain[k].sid] = '1';
            if (strcmp(row, table[i].row) != 0) {
                fprintf(stderr, "subject %s: %s, expected %s\n", table[i].subject, row, table[i].row);
                exit(1);
            }
        }
    nsn_routes_free(routes);
}

TEST(invalid_pattern_is_refused_and_a_used_sid_stays)
{
    struct nsn_routes *routes = nsn_routes_new(0);
    CHECK_EQUAL(add(routes, 1, 1, "foo..bar", ""), -EINVAL);
    CHECK_EQUAL(add(routes, 1, 1, "", ""), -EINVAL);
    char *longest = malloc(NSN_SUBJECT_MAX + 1);
    memset(longest, 'x', NSN_SUBJECT_MAX + 1);
    struct nsn_target target = {1, 1, 7};
    CHECK_EQUAL(nsn_routes_add(routes, target, longest, NSN_SUBJECT_MAX + 1, NULL, 0), -EINVAL);
    CHECK_EQUAL(nsn_routes_add(routes, target, "a", 1, longest, NSN_SUBJECT_MAX + 1), -EINVAL);
    CHECK_EQUAL(nsn_routes_add(routes, target, longest, NSN_SUBJECT_MAX, longest, NSN_SUBJECT_MAX), 0);
    CHECK_EQUAL(nsn_routes_lookup(routes, longest, NSN_SUBJECT_MAX)->queue_count, 1);
    CHECK_EQUAL(nsn_routes_lookup(routes, longest, NSN_SUBJECT_MAX + 1)->queue_count, 0);
    free(longest);
    CHECK_EQUAL(add(routes, 1, 1, "a", ""), 0);
    CHECK_EQUAL(add(routes, 1, 1, "b", ""), -EEXIST);
    CHECK_EQUAL(plain(routes, "a"), 1);
    CHECK_EQUAL(plain(routes, "b"), 0);
    CHECK_EQUAL(take_out(routes, 1, 2), -ENOENT);
    CHECK_EQUAL(take_out(routes, 1, 1), 0);
    CHECK_EQUAL(add(routes, 1, 1, "b", ""), 0);
    CHECK_EQUAL(plain(routes, "b"), 1);
    nsn_routes_free(routes);
}

TEST(plain_targets_are_sorted_by_slot_over_all_patterns)
{
    struct nsn_routes *routes = nsn_routes_new(0);
    const char *patterns[] = {"a.b", "a.*", "a.>", ">", "*.b"};
    uint32_t random = 5;
    for (uint32_t sid = 0; sid < 300; sid++) {
        random = random * 1664525 + 1013904223;
        CHECK_EQUAL(add(routes, random >> 26, sid, patterns[sid % 5], ""), 0);
    }
    const struct nsn_route *route = look(routes, "a.b");
    CHECK_EQUAL(route->plain_count, 300);
    for (uint32_t i = 1; i < route->plain_count; i++) {
        const struct nsn_target *a = &route->plain[i - 1], *b = &route->plain[i];
        CHECK(a->slot < b->slot || (a->slot == b->slot && a->sid < b->sid));
    }
    nsn_routes_free(routes);
}

TEST(queue_group_has_its_members_of_all_matching_patterns)
{
    struct nsn_routes *routes = nsn_routes_new(0);
    add(routes, 3, 1, "q.*", "grp");
    add(routes, 1, 2, "q.*", "grp");
    add(routes, 2, 3, "q.a", "grp");
    add(routes, 2, 4, "q.>", "grp");
    add(routes, 2, 5, "q.>", "other");
    add(routes, 2, 6, "q.>", "");
    for (int pass = 0; pass < 2; pass++) {
        const struct nsn_route *route = look(routes, "q.a");
        CHECK_EQUAL(route->plain_count, 1);
        CHECK_EQUAL(route->queue_count, 2);
        bool grp_first = route->queues[0].count == 4;
        const struct nsn_route_queue *grp = &route->queues[!grp_first], *other = &route->queues[grp_first];
        CHECK(grp->count == 4 && grp->name_length == 3 && memcmp(grp->name, "grp", 3) == 0);
        CHECK(other->count == 1 && other->name_length == 5 && memcmp(other->name, "other", 5) == 0);
        uint32_t sids = 0;
        for (uint32_t i = 0; i < 4; i++)
            sids |= 1u << grp->members[i].sid;
        CHECK_EQUAL(sids, 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4);
        CHECK_EQUAL(look(routes, "q.b")->queues[0].count + look(routes, "q.b")->queues[1].count, 4);
    }
    nsn_routes_free(routes);
}

TEST(change_drops_from_the_cache_only_what_it_matches)
{
    struct nsn_routes *routes = nsn_routes_new(64);
    add(routes, 1, 1, "a.*", "");
    plain(routes, "a.1"), plain(routes, "a.2"), plain(routes, "b.1"), plain(routes, "alpha.beta.gamma");
    CHECK_EQUAL(nsn_routes_cached(routes), 4);
    add(routes, 1, 2, "a.1", "");
    CHECK_EQUAL(nsn_routes_cached(routes), 3);
    CHECK_EQUAL(plain(routes, "a.1"), 2);
    add(routes, 1, 3, "c.>", "");
    CHECK_EQUAL(nsn_routes_cached(routes), 4);
    take_out(routes, 1, 1);
    CHECK_EQUAL(nsn_routes_cached(routes), 2);
    CHECK_EQUAL(plain(routes, "a.2"), 0);
    add(routes, 1, 4, "alpha.*.gamma", "");
    CHECK_EQUAL(nsn_routes_cached(routes), 2);
    CHECK_EQUAL(plain(routes, "alpha.beta.gamma"), 1);
    add(routes, 1, 5, ">", "");
    CHECK_EQUAL(nsn_routes_cached(routes), 0);
    nsn_routes_free(routes);
}

TEST(cache_and_memory_are_bounded_over_many_subjects)
{
    struct nsn_routes *routes = nsn_routes_new(128);
    add(routes, 1, 1, "many.>", "");
    add(routes, 1, 2, "many.*.>", "");
    char subject[512];
    size_t most = 0;
    for (int pass = 0; pass < 3; pass++)
        for (int i = 0; i < 20000; i++) {
            int length = snprintf(subject, sizeof(subject), "many.%d%s", i, i % 2 ? ".x" : "");
            if (i % 5 == 0) { /* longer than what a cached subject holds itself */
                memset(subject + length, 'y', 200);
                length += 200;
            }
            const struct nsn_route *route = nsn_routes_lookup(routes, subject, (size_t)length);
            CHECK_EQUAL(route->plain_count, i % 2 ? 2 : 1);
            most = nsn_routes_bytes(routes) > most ? nsn_routes_bytes(routes) : most;
        }
    CHECK_EQUAL(nsn_routes_cached(routes), 128);
    CHECK(most < 512 * 1024);
    nsn_routes_free(routes);
}

TEST(large_merged_routes_do_not_exceed_the_memory_bound)
{
    struct nsn_routes *routes = nsn_routes_new(256);
    char pattern[32];
    for (uint32_t sid = 0; sid < 2000; sid++)
        CHECK_EQUAL(add(routes, sid % 50, sid, ">", ""), 0);
    for (uint32_t i = 0; i < 256; i++) {
        snprintf(pattern, sizeof(pattern), "s.%u", i);
        CHECK_EQUAL(add(routes, 60, i, pattern, ""), 0);
    }
    size_t before = nsn_routes_bytes(routes);
    for (int pass = 0; pass < 2; pass++)
        for (uint32_t i = 0; i < 256; i++) {
            snprintf(pattern, sizeof(pattern), "s.%u", i);
            CHECK_EQUAL(plain(routes, pattern), 2001);
        }
    CHECK(nsn_routes_cached(routes) > 4);
    CHECK(nsn_routes_bytes(routes) < before + 256 * 1024 + 256 * 1024);
    nsn_routes_free(routes);
}

TEST(subject_seen_twice_enters_a_full_cache)
{
    struct nsn_routes *routes = nsn_routes_new(4);
    add(routes, 1, 1, ">", "");
    plain(routes, "a"), plain(routes, "b"), plain(routes, "c"), plain(routes, "d");
    size_t bytes = nsn_routes_bytes(routes);
    for (int i = 0; i < 3; i++)
        CHECK_EQUAL(plain(routes, "e"), 1);
    CHECK_EQUAL(nsn_routes_cached(routes), 4);
    CHECK_EQUAL(nsn_routes_bytes(routes), bytes);
    nsn_routes_free(routes);
}

TEST(deepest_subject_and_pattern_resolve)
{
    struct nsn_routes *routes = nsn_routes_new(0);
    static char deep[NSN_SUBJECT_MAX], stars[NSN_SUBJECT_MAX];
    for (size_t i = 0; i < sizeof(deep); i++) {
        deep[i] = i % 2 ? '.' : 'a';
        stars[i] = i % 2 ? '.' : '*';
    }
    struct nsn_target first = {1, 1, 1}, second = {1, 1, 2};
    CHECK_EQUAL(nsn_routes_add(routes, first, deep, NSN_SUBJECT_MAX - 1, NULL, 0), 0);
    CHECK_EQUAL(nsn_routes_add(routes, second, stars, NSN_SUBJECT_MAX - 1, NULL, 0), 0);
    CHECK_EQUAL(nsn_routes_lookup(routes, deep, NSN_SUBJECT_MAX - 1)->plain_count, 2);
    CHECK_EQUAL(nsn_routes_lookup(routes, deep, NSN_SUBJECT_MAX)->plain_count, 0);
    CHECK_EQUAL(nsn_routes_lookup(routes, deep, NSN_SUBJECT_MAX - 3)->plain_count, 0);
    nsn_routes_free(routes);
}

TEST(memory_returns_to_where_it_was_when_all_is_removed)
{
    struct nsn_routes *routes = nsn_routes_new(0);
    char pattern[64];
    size_t peak = 0, first = 0;
    for (int round = 0; round < 3; round++) {
        for (uint32_t i = 0; i < 5000; i++) {
            snprintf(pattern, sizeof(pattern), i % 3 ? "x.%u.y" : "x.%u.*", i);
            CHECK_EQUAL(add(routes, i % 7, i, pattern, i % 5 ? "" : "workers"), 0);
            plain(routes, pattern);
        }
        peak = nsn_routes_bytes(routes);
        for (uint32_t slot = 0; slot < 7; slot++)
            CHECK_EQUAL(nsn_routes_remove_session(routes, slot, 1), 5000 / 7 + (slot < 5000 % 7));
        CHECK_EQUAL(nsn_routes_remove_session(routes, 1, 1), 0);
        CHECK_EQUAL(nsn_routes_count(routes), 0);
        nsn_routes_clear(routes);
        if (round == 0)
            first = nsn_routes_bytes(routes);
    }
    CHECK_EQUAL(nsn_routes_bytes(routes), first);
    CHECK(first < peak);
    nsn_routes_free(routes);
}

/* --- against a naive model ----------------------------------------------------------------------------------------- */

enum { SUBSCRIPTIONS = 400, SLOTS = 5, SIDS = 80, QUEUES = 4 };

struct model_entry {
    bool used;
    char pattern[40], queue[4];
};

static struct model_entry model[SLOTS][SIDS];
static uint64_t state;

static uint32_t below(uint32_t bound)
{
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(state >> 33) % bound;
}

static void random_subject(char *out, bool pattern)
{
    static const char *tokens[] = {"a", "b", "c", "long-token-number-one", "a*", ">>", "*", ">"};
    uint32_t count = 1 + below(4);
    *out = '\0';
    for (uint32_t i = 0; i < count; i++) {
        uint32_t pick = below(pattern ? 10 : 9);
        const char *token = pick < 8 ? tokens[pick >= 6 && below(3) ? below(2) : pick] : pattern ? "*" : "b";
        if (i + 1 < count && pattern && strcmp(token, ">") == 0)
            token = "*";
        if (strlen(out) + strlen(token) + 2 >= 40)
            break;
        if (*out)
            strcat(out, ".");
        strcat(out, token);
    }
    if (!pattern && below(40) == 0)
        strcat(out, ".");
}

static uint32_t model_members(const char *subject, const char *queue, uint8_t members[SLOTS][SIDS])
{
    uint32_t count = 0;
    memset(members, 0, SLOTS * SIDS);
    if (!nsn_subject_routable(subject, strlen(subject)))
        return 0;
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        for (uint32_t sid = 0; sid < SIDS; sid++) {
            const struct model_entry *entry = &model[slot][sid];
            if (!entry->used || strcmp(entry->queue, queue) != 0)
                continue;
            if (!nsn_pattern_matches(entry->pattern, strlen(entry->pattern), subject, strlen(subject)))
                continue;
            members[slot][sid] = 1;
            count++;
        }
    return count;
}

static void check_members(const char *subject, const char *queue, const struct nsn_target *targets, uint32_t count)
{
    uint8_t members[SLOTS][SIDS];
    CHECK_EQUAL(count, model_members(subject, queue, members));
    for (uint32_t i = 0; i < count; i++) {
        CHECK(targets[i].slot < SLOTS && targets[i].sid < SIDS && members[targets[i].slot][targets[i].sid]);
        members[targets[i].slot][targets[i].sid] = 0;
    }
}

static void check_lookup(struct nsn_routes *routes)
{
    static const char *queues[QUEUES] = {"q", "w", "qq", "x"};
    char subject[48];
    uint8_t members[SLOTS][SIDS];
    random_subject(subject, false);
    const struct nsn_route *route = look(routes, subject);
    check_members(subject, "", route->plain, route->plain_count);
    for (uint32_t i = 1; i < route->plain_count; i++)
        CHECK(route->plain[i - 1].slot <= route->plain[i].slot);
    uint32_t groups = 0;
    for (int q = 0; q < QUEUES; q++)
        groups += model_members(subject, queues[q], members) > 0;
    CHECK_EQUAL(route->queue_count, groups);
    for (uint32_t i = 0; i < route->queue_count; i++) {
        char name[8] = "";
        memcpy(name, route->queues[i].name, route->queues[i].name_length);
        check_members(subject, name, route->queues[i].members, route->queues[i].count);
    }
}

static void model_change(struct nsn_routes *routes)
{
    static const char *queues[] = {"", "", "", "q", "w", "qq", "x"};
    uint32_t slot = below(SLOTS), sid = below(SIDS);
    struct model_entry *entry = &model[slot][sid];
    if (below(200) == 0) {
        size_t count = 0;
        for (uint32_t i = 0; i < SIDS; i++) {
            count += model[slot][i].used;
            model[slot][i].used = false;
        }
        CHECK_EQUAL(nsn_routes_remove_session(routes, slot, 1), count);
    } else if (below(5) < 3) {
        char pattern[48];
        random_subject(pattern, true);
        const char *queue = queues[below(7)];
        bool valid = nsn_pattern_valid(pattern, strlen(pattern));
        CHECK_EQUAL(add(routes, slot, sid, pattern, queue), !valid ? -EINVAL : entry->used ? -EEXIST : 0);
        if (valid && !entry->used) {
            entry->used = true;
            strcpy(entry->pattern, pattern);
            strcpy(entry->queue, queue);
        }
    } else {
        CHECK_EQUAL(take_out(routes, slot, sid), entry->used ? 0 : -ENOENT);
        entry->used = false;
    }
}

static void run_model(uint64_t seed, size_t cache_entries, int steps)
{
    printf("seed %llu, cache of %zu\n", (unsigned long long)seed, cache_entries);
    state = seed;
    memset(model, 0, sizeof(model));
    struct nsn_routes *routes = nsn_routes_new(cache_entries);
    for (int i = 0; i < steps; i++) {
        if (below(4) == 0)
            model_change(routes);
        else
            check_lookup(routes);
        if (below(5000) == 0) {
            nsn_routes_clear(routes);
            memset(model, 0, sizeof(model));
            CHECK_EQUAL(nsn_routes_count(routes), 0);
        }
        CHECK(nsn_routes_cached(routes) <= (cache_entries ? cache_entries : 4096));
    }
    nsn_routes_free(routes);
}

TEST(random_changes_and_lookups_agree_with_a_naive_search)
{
    const char *given = getenv("NSN_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 10) : (uint64_t)time(NULL);
    run_model(seed, 0, 20000);
    run_model(seed + 1, 1, 10000);
    run_model(seed + 2, 7, 20000);
    run_model(seed + 3, 100, 20000);
}

CHECK_MAIN()
