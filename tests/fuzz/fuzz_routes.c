/* Subjects, patterns and the index of routes, against matching token by token as the rules are written down. */
#include <errno.h>

#include "fuzz.h"
#include "nsn_route.h"
#include "nsn_subject.h"

#define SUBSCRIPTIONS 24
#define TEXT_MOST 40

struct text {
    char bytes[TEXT_MOST];
    size_t length;
};

struct subscription {
    struct nsn_target target;
    struct text pattern, queue;
    bool there;
};

/* --- the rules, naively -------------------------------------------------------------------------------------------------- */

struct token {
    const char *bytes;
    size_t length;
};

static size_t split(const struct text *text, struct token tokens[TEXT_MOST + 1])
{
    size_t count = 0, start = 0;
    for (size_t i = 0; i <= text->length; i++)
        if (i == text->length || text->bytes[i] == '.') {
            tokens[count++] = (struct token){text->bytes + start, i - start};
            start = i + 1;
        }
    return count;
}

static bool is(const struct token *token, char byte) { return token->length == 1 && token->bytes[0] == byte; }

static bool is_routable(const struct text *text)
{
    struct token tokens[TEXT_MOST + 1];
    size_t count = split(text, tokens);
    for (size_t i = 0; i < count; i++)
        if (!tokens[i].length)
            return false;
    return true;
}

static bool is_valid(const struct text *text)
{
    struct token tokens[TEXT_MOST + 1];
    size_t count = split(text, tokens);
    for (size_t i = 0; i + 1 < count; i++)
        if (is(&tokens[i], '>'))
            return false;
    return is_routable(text);
}

static bool has_wildcard(const struct text *text)
{
    struct token tokens[TEXT_MOST + 1];
    size_t count = split(text, tokens);
    for (size_t i = 0; i < count; i++)
        if (is(&tokens[i], '*') || is(&tokens[i], '>'))
            return true;
    return false;
}

static bool matches(const struct text *pattern, const struct text *subject)
{
    struct token wanted[TEXT_MOST + 1], given[TEXT_MOST + 1];
    size_t count = split(pattern, wanted), have = split(subject, given);
    for (size_t i = 0; i < count; i++) {
        if (is(&wanted[i], '>'))
            return have > i;
        if (i >= have)
            return false;
        if (!is(&wanted[i], '*') &&
            (wanted[i].length != given[i].length || memcmp(wanted[i].bytes, given[i].bytes, given[i].length) != 0))
            return false;
    }
    return count == have;
}

/* --- the input ------------------------------------------------------------------------------------------------------------ */

/* Mostly of a few bytes that make tokens meet. */
static struct text take_text(struct input *input)
{
    static const char alphabet[16] = "..ab*>ab.*>a\0\xff.b";
    struct text text = {.length = take8(input) % TEXT_MOST};
    bool raw = take8(input) % 8 == 0;
    for (size_t i = 0; i < text.length; i++) {
        uint8_t byte = take8(input);
        text.bytes[i] = raw ? (char)byte : alphabet[byte % 16];
    }
    return text;
}

static void check_texts(const struct text *pattern, const struct text *subject)
{
    bool valid = nsn_pattern_valid(pattern->bytes, pattern->length);
    bool routable = nsn_subject_routable(subject->bytes, subject->length);
    MUST(valid == is_valid(pattern));
    MUST(routable == is_routable(subject));
    if (!valid)
        return;
    size_t prefix = nsn_pattern_literal_prefix(pattern->bytes, pattern->length);
    MUST(nsn_pattern_has_wildcard(pattern->bytes, pattern->length) == has_wildcard(pattern));
    MUST(prefix <= pattern->length && (prefix < pattern->length) == has_wildcard(pattern));
    if (!routable)
        return;
    bool match = nsn_pattern_matches(pattern->bytes, pattern->length, subject->bytes, subject->length);
    MUST(match == matches(pattern, subject));
    MUST(!match || (prefix <= subject->length && memcmp(pattern->bytes, subject->bytes, prefix) == 0));
}

static bool same(const struct nsn_target *a, const struct nsn_target *b)
{
    return a->slot == b->slot && a->generation == b->generation && a->sid == b->sid;
}

static uint32_t times(const struct nsn_target *targets, uint32_t count, const struct nsn_target *target)
{
    uint32_t found = 0;
    for (uint32_t i = 0; i < count; i++)
        found += same(&targets[i], target);
    return found;
}

/* How often the route has the subscription, where it belongs; and not elsewhere. */
static uint32_t times_in(const struct nsn_route *route, const struct subscription *one)
{
    uint32_t found = 0;
    if (!one->queue.length)
        return times(route->plain, route->plain_count, &one->target);
    MUST(times(route->plain, route->plain_count, &one->target) == 0);
    for (uint32_t i = 0; i < route->queue_count; i++) {
        const struct nsn_route_queue *queue = &route->queues[i];
        bool its = queue->name_length == one->queue.length && memcmp(queue->name, one->queue.bytes, queue->name_length) == 0;
        uint32_t members = times(queue->members, queue->count, &one->target);
        MUST(its || members == 0);
        found += members;
    }
    return found;
}

static void check_lookup(struct nsn_routes *routes, const struct subscription *all, const struct text *subject)
{
    const struct nsn_route *route = nsn_routes_lookup(routes, subject->bytes, subject->length);
    uint32_t expected = 0, there = route ? route->plain_count : 0;
    MUST(route);
    for (uint32_t i = 0; i < route->queue_count; i++) {
        MUST(route->queues[i].count > 0);
        there += route->queues[i].count;
    }
    for (uint32_t i = 1; i < route->plain_count; i++)
        MUST(route->plain[i - 1].slot <= route->plain[i].slot);
    for (int i = 0; i < SUBSCRIPTIONS; i++) {
        bool wanted = all[i].there && is_routable(subject) && matches(&all[i].pattern, subject);
        MUST(!all[i].there || times_in(route, &all[i]) == wanted);
        expected += wanted;
    }
    MUST(there == expected);
}

static void change(struct nsn_routes *routes, struct subscription *all, struct input *input)
{
    uint8_t which = take8(input);
    struct subscription *one = &all[which % SUBSCRIPTIONS];
    if (one->there) {
        MUST(nsn_routes_remove(routes, one->target) == 0);
        MUST(nsn_routes_remove(routes, one->target) == -ENOENT);
        one->there = false;
        return;
    }
    *one = (struct subscription){.target = {which % 3, 1 + which % 2, which % SUBSCRIPTIONS}, .pattern = take_text(input)};
    if (which & 128)
        one->queue = take_text(input);
    int result = nsn_routes_add(routes, one->target, one->pattern.bytes, one->pattern.length, one->queue.bytes,
                                one->queue.length);
    MUST(result == (is_valid(&one->pattern) ? 0 : -EINVAL));
    one->there = result == 0;
    if (one->there)
        MUST(nsn_routes_add(routes, one->target, "x", 1, "", 0) == -EEXIST);
}

static void session_goes(struct nsn_routes *routes, struct subscription *all, uint8_t which)
{
    size_t gone = 0;
    for (int i = 0; i < SUBSCRIPTIONS; i++)
        if (all[i].there && all[i].target.slot == which % 3 && all[i].target.generation == 1u + which % 2) {
            all[i].there = false;
            gone++;
        }
    MUST(nsn_routes_remove_session(routes, which % 3, 1 + which % 2) == gone);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, data + size};
    struct subscription all[SUBSCRIPTIONS] = {0};
    struct text subject = {0}, pattern = {0};
    struct nsn_routes *routes = nsn_routes_new(take8(&input) % 4 ? 3 : 0);
    MUST(routes);
    while (input.at < input.end) {
        switch (take8(&input) % 8) {
        case 0: pattern = take_text(&input); break;
        case 1: subject = take_text(&input); break;
        case 2:
        case 3:
        case 4: change(routes, all, &input); break;
        case 5: session_goes(routes, all, take8(&input)); break;
        default: check_lookup(routes, all, &subject);
        }
        check_texts(&pattern, &subject);
    }
    size_t there = 0;
    for (int i = 0; i < SUBSCRIPTIONS; i++)
        there += all[i].there;
    MUST(nsn_routes_count(routes) == there);
    nsn_routes_free(routes);
    return 0;
}
