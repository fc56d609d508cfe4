/* The interest log: what nsnd writes reaches every reader, over moves, restarts, deaths and full file systems. */
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>

#include "nsn_log.h"
#include "nsn_protocol.h"
#include "nsn_shared.h"
#include "nsn_subject.h"
#include "scratch.h"

static char error[256];
static uint64_t *head; /* shared with forked children */

/* An empty directory, and no log. */
static void start(void)
{
    if (!head)
        head = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(head != MAP_FAILED);
    *head = 0;
    scratch_make();
}

static int try_writer(struct nsn_log_writer **writer, size_t size)
{
    return nsn_log_writer_open(writer, scratch, head, size, error, sizeof(error));
}

static struct nsn_log_writer *open_writer(size_t size)
{
    struct nsn_log_writer *writer = NULL;
    int result = try_writer(&writer, size);
    if (result)
        fprintf(stderr, "%s\n", error);
    CHECK_EQUAL(result, 0);
    return writer;
}

static struct nsn_log_reader open_reader(void)
{
    struct nsn_log_reader reader;
    CHECK_EQUAL(nsn_log_reader_open(&reader, scratch, head, error, sizeof(error)), 0);
    return reader;
}

static int add(struct nsn_log_writer *writer, uint32_t slot, uint32_t sid, const char *pattern, const char *queue)
{
    return nsn_log_writer_add(writer, (struct nsn_target){slot, 1, sid}, pattern, strlen(pattern), queue, strlen(queue));
}

static int take_out(struct nsn_log_writer *writer, uint32_t slot, uint32_t sid)
{
    return nsn_log_writer_remove(writer, (struct nsn_target){slot, 1, sid});
}

static int replay(struct nsn_log_reader *reader, struct nsn_routes *routes)
{
    *error = '\0';
    int result = nsn_log_reader_replay(reader, routes, error, sizeof(error));
    CHECK(result >= 0 || *error);
    return result;
}

static const struct nsn_route *look(struct nsn_routes *routes, const char *subject)
{
    return nsn_routes_lookup(routes, subject, strlen(subject));
}

static uint64_t generation(const struct nsn_log_reader *reader) { return nsn_log_generation(reader->reached); }

static uint64_t reached(const struct nsn_log_reader *reader) { return reader->base + reader->count; }

/* A visit's context: the routes that must know each live subscription. */
static int check_one(void *context, struct nsn_target target, const char *pattern, size_t length, const char *queue,
                     size_t queue_length)
{
    int expected = nsn_routes_add(context, target, pattern, length, queue, queue_length);
    CHECK_EQUAL(expected, -EEXIST);
    if (nsn_pattern_has_wildcard(pattern, length))
        return 0;
    const struct nsn_route *route = nsn_routes_lookup(context, pattern, length);
    bool found = false;
    for (uint32_t i = 0; i < route->plain_count && !queue_length; i++)
        found |= memcmp(&route->plain[i], &target, sizeof(target)) == 0;
    for (uint32_t q = 0; q < route->queue_count; q++)
        for (uint32_t i = 0; i < route->queues[q].count && route->queues[q].name_length == queue_length; i++)
            found |= memcmp(&route->queues[q].members[i], &target, sizeof(target)) == 0;
    CHECK(found);
    return 0;
}

/* The reader, brought up to date, knows exactly what the writer holds. */
static void check_agree(struct nsn_log_writer *writer, struct nsn_log_reader *reader, struct nsn_routes *routes)
{
    CHECK(replay(reader, routes) >= 0);
    CHECK(!nsn_log_reader_behind(reader));
    CHECK_EQUAL(reached(reader), nsn_log_writer_number(writer));
    CHECK_EQUAL(nsn_routes_count(routes), nsn_log_writer_count(writer));
    CHECK_EQUAL(nsn_log_writer_visit(writer, check_one, routes), 0);
}

TEST(every_change_reaches_a_reader)
{
    start();
    struct nsn_log_writer *writer = open_writer(0);
    struct nsn_log_reader reader = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0);
    CHECK(!nsn_log_reader_behind(&reader));
    CHECK_EQUAL(replay(&reader, routes), 0);
    CHECK_EQUAL(add(writer, 1, 1, "a.*", ""), 0);
    CHECK_EQUAL(add(writer, 1, 2, "a.b", "workers"), 0);
    CHECK_EQUAL(add(writer, 2, 1, "a.b", "workers"), 0);
    CHECK(nsn_log_reader_behind(&reader));
    CHECK_EQUAL(replay(&reader, routes), 1);
    CHECK_EQUAL(replay(&reader, routes), 0);
    CHECK(look(routes, "a.b")->plain_count == 1 && look(routes, "a.b")->queues[0].count == 2);
    CHECK_EQUAL(take_out(writer, 1, 1), 0);
    CHECK_EQUAL(replay(&reader, routes), 1);
    CHECK_EQUAL(look(routes, "a.b")->plain_count, 0);
    CHECK_EQUAL(nsn_log_writer_session_count(writer, 1, 1), 1);
    CHECK_EQUAL(nsn_log_writer_session_gone(writer, 1, 1), 1);
    CHECK_EQUAL(nsn_log_writer_session_gone(writer, 1, 1), 0);
    check_agree(writer, &reader, routes);
    CHECK_EQUAL(nsn_log_writer_number(writer), 5);
    CHECK_EQUAL(look(routes, "a.b")->queues[0].count, 1);
    nsn_routes_free(routes);
    nsn_log_reader_close(&reader);
    nsn_log_writer_close(writer);
    scratch_remove();
}

TEST(change_that_cannot_be_made_says_why_and_is_not_logged)
{
    start();
    struct nsn_log_writer *writer = open_writer(0);
    static char longest[NSN_SUBJECT_MAX + 2];
    memset(longest, 'x', NSN_SUBJECT_MAX + 1);
    CHECK_EQUAL(add(writer, 1, 1, "a", ""), 0);
    CHECK_EQUAL(add(writer, 1, 1, "b", ""), -EEXIST);
    CHECK_EQUAL(add(writer, 1, 2, "a..b", ""), -EINVAL);
    CHECK_EQUAL(add(writer, 1, 2, "", ""), -EINVAL);
    CHECK_EQUAL(add(writer, 1, 2, longest, ""), -EINVAL);
    CHECK_EQUAL(add(writer, 1, 2, "a", longest), -EINVAL);
    CHECK_EQUAL(take_out(writer, 1, 2), -ENOENT);
    CHECK_EQUAL(nsn_log_writer_number(writer), 1);
    longest[NSN_SUBJECT_MAX] = '\0';
    CHECK_EQUAL(add(writer, 1, 2, longest, longest), 0);
    struct nsn_log_reader reader = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0);
    check_agree(writer, &reader, routes);
    nsn_routes_free(routes);
    nsn_log_reader_close(&reader);
    nsn_log_writer_close(writer);
    scratch_remove();
}

TEST(full_log_moves_and_a_reader_that_slept_through_several_moves_follows)
{
    char pattern[64];
    start();
    struct nsn_log_writer *writer = open_writer(4096);
    struct nsn_log_reader reader = open_reader(), sleeper = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0), *slept = nsn_routes_new(0);
    uint64_t first = generation(&reader), last_number = 0;
    add(writer, 9, 9, "gone.soon", "");
    CHECK_EQUAL(replay(&sleeper, slept), 1);
    take_out(writer, 9, 9);
    for (uint32_t i = 0; i < 3000; i++) {
        snprintf(pattern, sizeof(pattern), "subject.number.%u", i);
        CHECK_EQUAL(add(writer, i % 5, i, pattern, i % 3 ? "" : "group"), 0);
        if (i % 4 == 0)
            CHECK_EQUAL(take_out(writer, i % 5, i), 0);
        if (i % 7 == 0)
            CHECK_EQUAL(replay(&reader, routes), 1);
        CHECK(nsn_log_writer_number(writer) > last_number);
        last_number = nsn_log_writer_number(writer);
    }
    check_agree(writer, &reader, routes);
    CHECK(generation(&reader) >= first + 3);
    check_agree(writer, &sleeper, slept);
    CHECK_EQUAL(look(slept, "gone.soon")->plain_count, 0);
    CHECK_EQUAL(generation(&sleeper), generation(&reader));
    char name[32];
    snprintf(name, sizeof(name), "log.%llu", (unsigned long long)generation(&reader) - 1);
    CHECK(!scratch_has(name) && !scratch_has("log.new"));
    nsn_routes_free(routes), nsn_routes_free(slept);
    nsn_log_reader_close(&reader), nsn_log_reader_close(&sleeper);
    nsn_log_writer_close(writer);
    scratch_remove();
}

TEST(log_of_mostly_dead_entries_moves_and_becomes_small_again)
{
    start();
    struct nsn_log_writer *writer = open_writer(0);
    struct nsn_log_reader reader = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0);
    CHECK_EQUAL(add(writer, 1, 0, "stays", ""), 0);
    for (uint32_t i = 1; i < 20000; i++) {
        CHECK_EQUAL(add(writer, 1, i, "comes.and.goes", ""), 0);
        CHECK_EQUAL(take_out(writer, 1, i), 0);
    }
    check_agree(writer, &reader, routes);
    CHECK(generation(&reader) > 2);
    CHECK(nsn_log_committed(reader.reached) < (1 << 18) + 4096);
    nsn_routes_free(routes);
    nsn_log_reader_close(&reader);
    nsn_log_writer_close(writer);
    scratch_remove();
}

TEST(next_nsnd_carries_the_same_log_and_number_on)
{
    start();
    struct nsn_log_writer *writer = open_writer(0);
    struct nsn_log_reader reader = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0);
    add(writer, 1, 1, "a", ""), add(writer, 1, 2, "b", "q"), add(writer, 2, 1, "c", ""), take_out(writer, 1, 1);
    CHECK_EQUAL(replay(&reader, routes), 1);
    nsn_log_writer_close(writer);
    writer = open_writer(0);
    CHECK_EQUAL(nsn_log_writer_number(writer), 4);
    CHECK_EQUAL(nsn_log_writer_count(writer), 2);
    CHECK_EQUAL(replay(&reader, routes), 0);
    CHECK_EQUAL(add(writer, 1, 2, "b", ""), -EEXIST);
    CHECK_EQUAL(add(writer, 1, 1, "again", ""), 0);
    check_agree(writer, &reader, routes);
    CHECK_EQUAL(generation(&reader), 1);
    nsn_routes_free(routes);
    nsn_log_reader_close(&reader);
    nsn_log_writer_close(writer);
    scratch_remove();
}

/* --- death between the steps of a move ------------------------------------------------------------------------------ */

static void put(const char *name, const void *bytes, size_t length, off_t at)
{
    int fd = scratch_open(name, O_RDWR);
    CHECK(fd >= 0 && pwrite(fd, bytes, length, at) == (ssize_t)length);
    close(fd);
}

static void link_name(const char *from, const char *to)
{
    char a[128], b[128];
    snprintf(a, sizeof(a), "%s/%s", scratch, from);
    snprintf(b, sizeof(b), "%s/%s", scratch, to);
    CHECK(link(a, b) == 0);
}

/* Leaves the directory as an nsnd does that dies in a move: log.2 beside log.1, and the head at the one or the other. */
static void check_interrupted_move(bool committed)
{
    char pattern[32];
    start();
    struct nsn_log_writer *writer = open_writer(4096);
    struct nsn_log_reader reader = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0);
    link_name("log.1", "kept");
    uint64_t before = 0, count = 0;
    for (uint32_t i = 0; scratch_has("log.1"); i++) {
        before = *head, count = nsn_log_writer_number(writer);
        snprintf(pattern, sizeof(pattern), "pattern.%u", i);
        CHECK_EQUAL(add(writer, 1, i, pattern, ""), 0);
    }
    nsn_log_writer_close(writer);
    link_name("kept", "log.1");
    if (committed)
        count++;
    else
        *head = before;
    int fd = scratch_open("log.new", O_RDWR | O_CREAT);
    close(fd);
    CHECK_EQUAL(replay(&reader, routes), 1);
    writer = open_writer(4096);
    CHECK_EQUAL(nsn_log_writer_number(writer), count);
    CHECK(!scratch_has(committed ? "log.1" : "log.2") && !scratch_has("log.new"));
    check_agree(writer, &reader, routes);
    CHECK_EQUAL(generation(&reader), committed ? 2 : 1);
    for (uint32_t i = 1000; generation(&reader) < 3; i++) { /* and goes on, over what is left */
        CHECK_EQUAL(add(writer, 1, i, "pattern", ""), 0);
        check_agree(writer, &reader, routes);
    }
    nsn_routes_free(routes);
    nsn_log_reader_close(&reader);
    nsn_log_writer_close(writer);
    scratch_remove();
}

TEST(death_before_a_move_is_committed_undoes_it) { check_interrupted_move(false); }
TEST(death_before_the_old_file_is_removed_is_made_good) { check_interrupted_move(true); }

TEST(files_of_a_log_that_nobody_knows_any_more_are_removed)
{
    start();
    struct nsn_log_writer *writer = open_writer(0);
    add(writer, 1, 1, "a", "");
    nsn_log_writer_close(writer);
    link_name("log.1", "log.7");
    *head = 0; /* as in new shared memory */
    writer = open_writer(0);
    CHECK_EQUAL(nsn_log_writer_number(writer), 0);
    CHECK(scratch_has("log.1") && !scratch_has("log.7"));
    nsn_log_writer_close(writer);
    scratch_remove();
}

TEST(what_was_not_committed_never_happened)
{
    start();
    struct nsn_log_writer *writer = open_writer(0);
    add(writer, 1, 1, "a", "");
    nsn_log_writer_close(writer);
    char half[20] = "half an entry";
    put("log.1", half, sizeof(half), NSN_LOG_HEADER_SIZE + (off_t)nsn_log_committed(*head));
    writer = open_writer(0);
    CHECK_EQUAL(nsn_log_writer_number(writer), 1);
    add(writer, 1, 2, "b", "");
    struct nsn_log_reader reader = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0);
    check_agree(writer, &reader, routes);
    nsn_routes_free(routes);
    nsn_log_reader_close(&reader);
    nsn_log_writer_close(writer);
    scratch_remove();
}

TEST(log_that_is_gone_is_an_error_with_words)
{
    struct nsn_log_reader reader;
    start();
    CHECK_EQUAL(nsn_log_reader_open(&reader, scratch, head, error, sizeof(error)), -ENOENT);
    CHECK(strstr(error, "interest log"));
    struct nsn_log_writer *writer = open_writer(0);
    reader = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0);
    *head = 9ull << NSN_LOG_COMMITTED_BITS;
    CHECK_EQUAL(replay(&reader, routes), -ENOENT);
    CHECK(strstr(error, "log.9 is gone"));
    CHECK(nsn_log_reader_behind(&reader));
    scratch_remove();
    CHECK_EQUAL(replay(&reader, routes), -ENOENT);
    nsn_log_reader_close(&reader);
    nsn_log_reader_close(&reader);
    nsn_routes_free(routes);
    nsn_log_writer_close(writer);
}

/* Cuts the log with this many bytes of entries left. */
static void cut(uint64_t left)
{
    char name[32];
    snprintf(name, sizeof name, "log.%llu", (unsigned long long)nsn_log_generation(*head));
    int fd = scratch_open(name, O_RDWR);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)(NSN_LOG_HEADER_SIZE + left)) == 0);
    close(fd);
}

TEST(file_that_was_cut_is_an_error_and_the_next_change_mends_it)
{
    start();
    struct nsn_log_writer *writer = open_writer(0);
    struct nsn_log_reader reader = open_reader(), behind = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0), *late = nsn_routes_new(0);
    add(writer, 1, 1, "first", ""), add(writer, 1, 2, "second", "");
    check_agree(writer, &reader, routes);
    cut(4);
    CHECK_EQUAL(replay(&reader, routes), 0); /* what it has read it has */
    CHECK_EQUAL(replay(&behind, late), -EPROTO);
    CHECK(strstr(error, "was cut, behind byte 0"));
    struct nsn_log_writer *another;
    CHECK_EQUAL(try_writer(&another, 0), -EPROTO);
    CHECK(strstr(error, "was cut"));
    CHECK_EQUAL(add(writer, 1, 3, "third", ""), 0);
    CHECK_EQUAL(nsn_log_writer_number(writer), 3);
    check_agree(writer, &reader, routes);
    check_agree(writer, &behind, late);
    CHECK_EQUAL(generation(&reader), 2);
    nsn_routes_free(routes), nsn_routes_free(late);
    nsn_log_reader_close(&reader), nsn_log_reader_close(&behind);
    nsn_log_writer_close(writer);
    scratch_remove();
}

TEST(file_that_was_removed_serves_those_who_have_it_open)
{
    start();
    struct nsn_log_writer *writer = open_writer(0);
    struct nsn_log_reader reader = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0);
    CHECK_EQUAL(add(writer, 1, 1, "first", ""), 0);
    scratch_remove(); /* and there is no directory for another */
    CHECK_EQUAL(add(writer, 1, 2, "second", ""), 0);
    check_agree(writer, &reader, routes);
    CHECK_EQUAL(nsn_log_writer_session_gone(writer, 1, 1), 2);
    check_agree(writer, &reader, routes);
    nsn_log_reader_close(&reader);
    nsn_log_writer_close(writer);
    nsn_routes_free(routes);
}

TEST(file_that_was_cut_is_seen_also_where_the_next_change_is_written_at_its_end)
{
    start();
    struct nsn_log_writer *writer = open_writer(8192);
    struct nsn_log_reader reader = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0);
    for (uint32_t i = 0; nsn_log_generation(*head) == 1; i++) {
        check_agree(writer, &reader, routes);
        if (nsn_log_committed(*head) > 4096)
            cut(0);
        CHECK_EQUAL(add(writer, 1, i, "pattern", ""), 0);
    }
    CHECK(nsn_log_writer_number(writer) < 4200 / 32); /* and not because it was full */
    check_agree(writer, &reader, routes);
    nsn_routes_free(routes);
    nsn_log_reader_close(&reader);
    nsn_log_writer_close(writer);
    scratch_remove();
}

/* --- broken files and batches --------------------------------------------------------------------------------------- */

static uint64_t state;

static uint32_t below(uint32_t bound)
{
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(state >> 33) % bound;
}

static uint64_t choose_seed(void)
{
    const char *given = getenv("NSN_SEED");
    state = given ? strtoull(given, NULL, 10) : (uint64_t)time(NULL);
    printf("seed %llu\n", (unsigned long long)state);
    return state;
}

struct patch {
    const char *what;
    off_t at;
    uint64_t value;
    size_t length;
};

#define ENTRY(field) (NSN_LOG_HEADER_SIZE + (off_t)offsetof(struct nsn_log_entry, field))
#define HEAD ((off_t)-1) /* what is patched is no file */
#define HEADER(field) ((off_t)offsetof(struct nsn_log_header, field))

TEST(broken_entry_is_told_from_a_sound_one)
{
    const struct patch patches[] = {
        {"length 0", ENTRY(length), 0, 4},
        {"length not of its strings", ENTRY(length), 48, 4},
        {"length behind the end", ENTRY(length), 1 << 30, 4},
        {"unknown change", ENTRY(op), 9, 1},
        {"no pattern", ENTRY(pattern_length), 0, 2},
        {"pattern too long", ENTRY(pattern_length), 5000, 2},
        {"queue too long", ENTRY(queue_length), 65535, 2},
        {"invalid pattern", ENTRY(op) + (off_t)sizeof(struct nsn_log_entry) - 4, '.', 1},
        {"committed end within an entry", HEAD, 8, 8},
        {"committed end behind the file", HEAD, 1 << 24, 8},
    };
    for (size_t i = 0; i < sizeof(patches) / sizeof(*patches); i++) {
        start();
        struct nsn_log_writer *writer = open_writer(0);
        struct nsn_log_reader reader = open_reader();
        add(writer, 1, 1, "abcd.efg", "");
        nsn_log_writer_close(writer);
        if (patches[i].at == HEAD)
            *head = (1ull << NSN_LOG_COMMITTED_BITS) + patches[i].value;
        else
            put("log.1", &patches[i].value, patches[i].length, patches[i].at);
        struct nsn_routes *routes = nsn_routes_new(0);
        int reads = replay(&reader, routes), opens = try_writer(&writer, 0);
        if (reads != -EPROTO || opens != -EPROTO) {
            fprintf(stderr, "%s: reader %d, writer %d\n", patches[i].what, reads, opens);
            exit(1);
        }
        CHECK_EQUAL(nsn_routes_count(routes), patches[i].value == 1 << 24); /* the entries before what is not there are sound */
        nsn_routes_free(routes);
        nsn_log_reader_close(&reader);
    }
    scratch_remove();
}

TEST(file_of_another_kind_is_refused_in_words)
{
    const struct { struct patch patch; int expected; } cases[] = {
        {{"magic", HEADER(magic), 1, 8}, -EPROTO},
        {{"version", HEADER(version), 7, 4}, -EPROTONOSUPPORT},
        {{"generation", HEADER(generation), 9, 8}, -EPROTO},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        start();
        struct nsn_log_writer *writer = open_writer(0);
        struct nsn_log_reader reader;
        nsn_log_writer_close(writer);
        put("log.1", &cases[i].patch.value, cases[i].patch.length, cases[i].patch.at);
        CHECK_EQUAL(nsn_log_reader_open(&reader, scratch, head, error, sizeof(error)), cases[i].expected);
        CHECK_EQUAL(try_writer(&writer, 0), cases[i].expected);
        CHECK(strstr(error, "log.1"));
    }
    start();
    int fd = scratch_open("log.4", O_RDWR | O_CREAT);
    close(fd);
    *head = 4ull << NSN_LOG_COMMITTED_BITS;
    struct nsn_log_writer *writer;
    CHECK_EQUAL(try_writer(&writer, 0), -EPROTO);
    scratch_remove();
}

TEST(random_bytes_in_a_log_break_nobody)
{
    uint64_t seed = choose_seed();
    for (int round = 0; round < 200; round++) {
        state = seed + (uint64_t)round;
        start();
        struct nsn_log_writer *writer = open_writer(0);
        for (uint32_t i = 0; i < 30; i++)
            add(writer, i % 3, i, i % 2 ? "some.subject" : "other.*.>", i % 5 ? "" : "queue");
        nsn_log_writer_session_gone(writer, 2, 1);
        nsn_log_writer_close(writer);
        struct nsn_log_reader reader = open_reader();
        struct nsn_routes *routes = nsn_routes_new(0);
        for (uint32_t i = 1 + below(6); i; i--) {
            uint8_t byte = (uint8_t)below(256);
            put("log.1", &byte, 1, NSN_LOG_HEADER_SIZE + (off_t)below((uint32_t)nsn_log_committed(*head)));
        }
        int result = replay(&reader, routes);
        CHECK(result == 1 || result == -EPROTO);
        result = try_writer(&writer, 0);
        CHECK(result == 0 || result == -EPROTO || result == -EEXIST);
        if (!result)
            nsn_log_writer_close(writer);
        nsn_routes_free(routes);
        nsn_log_reader_close(&reader);
    }
    scratch_remove();
}

struct batch {
    uint8_t bytes[4096];
    size_t length;
    uint32_t count;
};

static void put_change(struct batch *batch, uint8_t op, uint32_t sid, const char *pattern, const char *queue)
{
    struct nsn_interest_change change = {op, 0, (uint16_t)strlen(pattern), (uint16_t)strlen(queue), 0, sid, 0};
    memcpy(batch->bytes + batch->length, &change, sizeof(change));
    memcpy(batch->bytes + batch->length + sizeof(change), pattern, strlen(pattern));
    memcpy(batch->bytes + batch->length + sizeof(change) + strlen(pattern), queue, strlen(queue));
    batch->length += (sizeof(change) + strlen(pattern) + strlen(queue) + 7) & ~(size_t)7;
    batch->count++;
}

/* From a copy that ends where the batch does, so that a sanitizer sees what is read behind it. */
static int apply(struct nsn_log_writer *writer, const struct batch *batch, size_t length, uint32_t count, uint32_t *failed)
{
    uint8_t *copy = malloc(length + 1);
    memcpy(copy + 1, batch->bytes, length);
    int result = nsn_log_writer_apply(writer, 4, 1, copy + 1, length, count, failed);
    free(copy);
    return result;
}

TEST(batch_is_applied_in_order_and_skips_what_nats_ignores)
{
    uint32_t failed;
    struct batch batch = {.length = 0};
    start();
    struct nsn_log_writer *writer = open_writer(0);
    put_change(&batch, NSN_INTEREST_ADD, 1, "a.b", "");
    put_change(&batch, NSN_INTEREST_ADD, 1, "other", "");
    put_change(&batch, NSN_INTEREST_REMOVE, 7, "", "");
    put_change(&batch, NSN_INTEREST_ADD, 2, "a.*", "queue");
    put_change(&batch, NSN_INTEREST_REMOVE, 1, "", "");
    put_change(&batch, NSN_INTEREST_ADD, 1, "c", "");
    CHECK_EQUAL(apply(writer, &batch, batch.length, batch.count, &failed), 0);
    CHECK_EQUAL(nsn_log_writer_number(writer), 4);
    CHECK_EQUAL(nsn_log_writer_session_count(writer, 4, 1), 2);
    struct nsn_log_reader reader = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0);
    check_agree(writer, &reader, routes);
    CHECK(look(routes, "a.b")->plain_count == 0 && look(routes, "c")->plain_count == 1);
    CHECK_EQUAL(look(routes, "a.b")->queue_count, 1);
    struct batch wrong = {.length = 0};
    put_change(&wrong, NSN_INTEREST_ADD, 10, "fine", "");
    put_change(&wrong, NSN_INTEREST_ADD, 11, "not..fine", "");
    put_change(&wrong, NSN_INTEREST_ADD, 12, "behind", "");
    CHECK_EQUAL(apply(writer, &wrong, wrong.length, wrong.count, &failed), -EINVAL);
    CHECK_EQUAL(failed, 1);
    check_agree(writer, &reader, routes);
    CHECK(look(routes, "fine")->plain_count == 1 && look(routes, "behind")->plain_count == 0);
    CHECK_EQUAL(apply(writer, &wrong, 0, 0, &failed), 0);
    nsn_routes_free(routes);
    nsn_log_reader_close(&reader);
    nsn_log_writer_close(writer);
    scratch_remove();
}

TEST(malformed_batch_is_refused_as_a_whole)
{
    uint32_t failed;
    struct batch batch = {.length = 0};
    start();
    struct nsn_log_writer *writer = open_writer(0);
    put_change(&batch, NSN_INTEREST_ADD, 1, "a.b", "");
    put_change(&batch, NSN_INTEREST_ADD, 2, "some.longer.pattern", "queue");
    for (size_t length = 0; length < batch.length; length++)
        CHECK_EQUAL(apply(writer, &batch, length, batch.count, &failed), -EBADMSG);
    CHECK_EQUAL(apply(writer, &batch, batch.length, 1, &failed), -EBADMSG);
    CHECK_EQUAL(apply(writer, &batch, batch.length, 3, &failed), -EBADMSG);
    struct batch odd = batch;
    odd.bytes[0] = 3;
    CHECK_EQUAL(apply(writer, &odd, odd.length, 2, &failed), -EBADMSG);
    odd.bytes[0] = NSN_INTEREST_REMOVE; /* with a pattern */
    CHECK_EQUAL(apply(writer, &odd, odd.length, 2, &failed), -EBADMSG);
    CHECK_EQUAL(nsn_log_writer_number(writer), 0);
    choose_seed();
    for (int round = 0; round < 20000; round++) {
        odd = batch;
        for (uint32_t i = 1 + below(4); i; i--)
            odd.bytes[below((uint32_t)odd.length)] = (uint8_t)below(256);
        int result = apply(writer, &odd, odd.length, 1 + below(3), &failed);
        CHECK(result == 0 || result == -EBADMSG || result == -EINVAL);
    }
    nsn_log_writer_close(writer);
    scratch_remove();
}

/* --- full file system ----------------------------------------------------------------------------------------------- */

static void log_on_a_full_file_system(void)
{
    static char pattern[1024];
    struct nsn_log_writer *writer = open_writer(1 << 20);
    struct nsn_log_reader reader = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0);
    scratch_fill();
    memset(pattern, 'p', sizeof(pattern) - 1);
    uint32_t count = 0;
    int result;
    while ((result = add(writer, count % 3, count, pattern, "")) == 0)
        count++;
    CHECK_EQUAL(result, -ENOSPC);
    CHECK(count > 10);
    check_agree(writer, &reader, routes);
    for (uint32_t i = 0; i < count; i++) /* what stands in it can always go */
        if (i % 3 != 2)
            CHECK_EQUAL(take_out(writer, i % 3, i), 0);
    CHECK_EQUAL(nsn_log_writer_session_gone(writer, 2, 1), count / 3);
    check_agree(writer, &reader, routes);
    nsn_log_writer_close(writer);
    writer = open_writer(0); /* another nsnd takes it over on the full file system */
    check_agree(writer, &reader, routes);
    scratch_empty();
    for (uint32_t i = 0; i < 200; i++)
        CHECK_EQUAL(add(writer, 7, i, pattern, ""), 0);
    check_agree(writer, &reader, routes);
    nsn_routes_free(routes);
    nsn_log_reader_close(&reader);
    nsn_log_writer_close(writer);
}

TEST(full_file_system_refuses_additions_and_not_removals)
{
    start();
    scratch_small(2048, log_on_a_full_file_system);
}

static void cut_on_a_full_file_system(void)
{
    struct nsn_log_writer *writer = open_writer(1 << 20);
    struct nsn_log_reader reader = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0);
    CHECK_EQUAL(add(writer, 1, 1, "first", ""), 0);
    check_agree(writer, &reader, routes);
    cut(0);
    scratch_fill();
    CHECK_EQUAL(add(writer, 1, 2, "second", ""), -ENOSPC);
    struct nsn_interest_change change = {.op = NSN_INTEREST_ADD, .pattern_length = 8, .sid = 5};
    uint8_t batch[sizeof change + 8];
    uint32_t failed = 0;
    memcpy(batch, &change, sizeof change), memcpy(batch + sizeof change, "pattern.", 8);
    batch[sizeof batch - 1] = 'x';
    CHECK_EQUAL(nsn_log_writer_apply(writer, 3, 1, batch, sizeof batch, 1, &failed), -ENOSPC);
    CHECK_EQUAL(failed, NSN_LOG_NOTHING_COMMITTED);
    CHECK_EQUAL(nsn_log_writer_apply(writer, 3, 1, batch, sizeof batch, 1, &failed), -ENOSPC); /* sent again */
    CHECK_EQUAL(failed, NSN_LOG_NOTHING_COMMITTED);
    CHECK_EQUAL(nsn_log_writer_session_gone(writer, 1, 1), -ENOSPC);
    CHECK_EQUAL(nsn_log_writer_session_gone(writer, 1, 1), -ENOSPC); /* until it is told */
    CHECK(!nsn_log_reader_behind(&reader));
    scratch_empty();
    CHECK_EQUAL(nsn_log_writer_session_gone(writer, 1, 1), 0); /* tells of what could not be told before */
    check_agree(writer, &reader, routes);
    CHECK_EQUAL(nsn_log_writer_apply(writer, 3, 1, batch, sizeof batch, 1, &failed), 0);
    CHECK_EQUAL(nsn_log_writer_count(writer), 1);
    check_agree(writer, &reader, routes);
    nsn_routes_free(routes);
    nsn_log_reader_close(&reader);
    nsn_log_writer_close(writer);
}

TEST(file_that_was_cut_is_written_anew_when_there_is_room)
{
    start();
    scratch_small(2048, cut_on_a_full_file_system);
}

/* --- random changes, death at any time, threads ----------------------------------------------------------------------- */

enum { MODEL_SLOTS = 4, MODEL_SIDS = 40 };

struct model { /* what should be there, and how many changes led to it */
    uint32_t pattern[MODEL_SLOTS][MODEL_SIDS]; /* number + 1; 0: not subscribed */
    uint64_t changes;
};

struct step {
    enum nsn_log_op op;
    uint32_t slot, sid, pattern;
};

/* The next change that will be made: one that changes something. */
static struct step next_step(const struct model *model)
{
    uint32_t slot = below(MODEL_SLOTS), sid = below(MODEL_SIDS), pattern = below(1000);
    if (!model->pattern[slot][sid])
        return (struct step){NSN_LOG_ADD, slot, sid, pattern};
    return (struct step){below(60) ? NSN_LOG_REMOVE : NSN_LOG_SESSION_GONE, slot, sid, 0};
}

static void model_step(struct model *model, struct step step)
{
    if (step.op == NSN_LOG_SESSION_GONE)
        memset(model->pattern[step.slot], 0, sizeof(model->pattern[0]));
    else
        model->pattern[step.slot][step.sid] = step.op == NSN_LOG_ADD ? step.pattern + 1 : 0;
    model->changes++;
}

static size_t pattern_name(char *out, size_t size, uint32_t number)
{
    return (size_t)snprintf(out, size, number % 10 ? "pattern.%u" : "pattern.%u.>", number);
}

static void writer_step(struct nsn_log_writer *writer, struct step step)
{
    char pattern[32];
    if (step.op == NSN_LOG_ADD) {
        pattern_name(pattern, sizeof(pattern), step.pattern);
        CHECK_EQUAL(add(writer, step.slot, step.sid, pattern, step.pattern % 3 ? "" : "group"), 0);
    } else if (step.op == NSN_LOG_REMOVE) {
        CHECK_EQUAL(take_out(writer, step.slot, step.sid), 0);
    } else {
        CHECK(nsn_log_writer_session_gone(writer, step.slot, 1) > 0);
    }
}

static int check_in_model(void *context, struct nsn_target target, const char *pattern, size_t length, const char *queue,
                          size_t queue_length)
{
    struct model *model = context;
    char name[32];
    (void)queue;
    CHECK(target.slot < MODEL_SLOTS && target.sid < MODEL_SIDS && target.generation == 1);
    uint32_t *number = &model->pattern[target.slot][target.sid];
    CHECK(*number);
    CHECK_EQUAL(length, pattern_name(name, sizeof(name), *number - 1));
    CHECK(memcmp(name, pattern, length) == 0);
    CHECK_EQUAL(queue_length, (*number - 1) % 3 ? 0 : 5);
    *number = 0;
    return 0;
}

static void check_model(const struct nsn_log_writer *writer, const struct model *model)
{
    static const struct model none;
    struct model copy = *model;
    CHECK_EQUAL(nsn_log_writer_number(writer), model->changes);
    CHECK_EQUAL(nsn_log_writer_visit(writer, check_in_model, &copy), 0);
    CHECK(memcmp(copy.pattern, none.pattern, sizeof(copy.pattern)) == 0);
}

TEST(random_changes_agree_with_a_naive_model_and_every_reader)
{
    choose_seed();
    start();
    struct model model = {.changes = 0};
    struct nsn_log_writer *writer = open_writer(4096);
    struct nsn_log_reader readers[3] = {open_reader(), open_reader(), open_reader()};
    struct nsn_routes *routes[3] = {nsn_routes_new(0), nsn_routes_new(16), nsn_routes_new(1)};
    for (int i = 0; i < 20000; i++) {
        struct step step = next_step(&model);
        model_step(&model, step);
        writer_step(writer, step);
        if (below(2000) == 0) {
            nsn_log_writer_close(writer);
            writer = open_writer(below(2) ? 4096 : 16384);
        }
        for (uint32_t r = 0; r < 3; r++)
            if (below(r * 400 + 1) == 0 && nsn_log_reader_behind(&readers[r]))
                CHECK_EQUAL(replay(&readers[r], routes[r]), 1);
    }
    check_model(writer, &model);
    for (int r = 0; r < 3; r++) {
        check_agree(writer, &readers[r], routes[r]);
        nsn_routes_free(routes[r]);
        nsn_log_reader_close(&readers[r]);
    }
    nsn_log_writer_close(writer);
    scratch_remove();
}

static void change_until_killed(struct model *model, uint64_t *done)
{
    struct nsn_log_writer *writer = open_writer(4096);
    CHECK_EQUAL(nsn_log_writer_number(writer), model->changes);
    for (;;) {
        struct step step = next_step(model);
        model_step(model, step);
        writer_step(writer, step);
        __atomic_store_n(done, model->changes, __ATOMIC_RELEASE);
    }
}

/* Makes the changes in a child that is killed once it has made some more than `wanted`; takes the model as far. */
static void change_and_kill(struct model *model, uint64_t *done, uint64_t wanted)
{
    fflush(stdout);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0)
        change_until_killed(model, done);
    while (__atomic_load_n(done, __ATOMIC_ACQUIRE) < wanted) {
        int status;
        CHECK(waitpid(child, &status, WNOHANG) == 0);
        nsn_cpu_relax();
    }
    CHECK(kill(child, SIGKILL) == 0);
    CHECK(waitpid(child, NULL, 0) == child);
    while (model->changes < __atomic_load_n(done, __ATOMIC_ACQUIRE))
        model_step(model, next_step(model));
}

TEST(writer_killed_at_any_time_leaves_what_it_had_committed)
{
    choose_seed();
    start();
    uint64_t *done = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(done != MAP_FAILED);
    struct model model = {.changes = 0};
    nsn_log_writer_close(open_writer(4096));
    struct nsn_log_reader reader = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0);
    for (int kills = 0; kills < 40; kills++) {
        struct model before = model;
        uint64_t random = state;
        change_and_kill(&model, done, model.changes + 1 + random % 397);
        struct nsn_log_writer *writer = open_writer(4096);
        if (nsn_log_writer_number(writer) == model.changes + 1) /* committed, and killed before it could say so */
            model_step(&model, next_step(&model));
        CHECK(model.changes > before.changes);
        check_model(writer, &model);
        check_agree(writer, &reader, routes);
        CHECK(!scratch_has("log.new"));
        nsn_log_writer_close(writer);
        *done = 0;
    }
    nsn_routes_free(routes);
    nsn_log_reader_close(&reader);
    munmap(done, 4096);
    scratch_remove();
}

struct race {
    struct nsn_log_writer *writer;
    uint64_t stop;
};

static void *follow(void *context)
{
    struct race *race = context;
    struct nsn_log_reader reader = open_reader();
    struct nsn_routes *routes = nsn_routes_new(0);
    char words[256];
    uint64_t last = 0, rounds = 0;
    while (!__atomic_load_n(&race->stop, __ATOMIC_ACQUIRE) || nsn_log_reader_behind(&reader)) {
        int result = nsn_log_reader_replay(&reader, routes, words, sizeof(words));
        if (result < 0)
            fprintf(stderr, "%s\n", words);
        CHECK(result >= 0);
        CHECK(reached(&reader) >= last);
        last = reached(&reader);
        const struct nsn_route *route = look(routes, "pattern.7"); /* always there */
        CHECK(!rounds || route->plain_count >= 1);
        rounds += result;
    }
    CHECK_EQUAL(nsn_routes_count(routes), nsn_log_writer_count(race->writer));
    CHECK_EQUAL(last, nsn_log_writer_number(race->writer));
    nsn_routes_free(routes);
    nsn_log_reader_close(&reader);
    return NULL;
}

TEST(readers_follow_while_the_writer_writes_and_moves)
{
    pthread_t threads[2];
    choose_seed();
    start();
    struct model model = {.changes = 0};
    struct race race = {.writer = open_writer(4096)};
    add(race.writer, 9, 1, "pattern.7", "");
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&threads[i], NULL, follow, &race) == 0);
    for (int i = 0; i < 20000; i++) {
        struct step step = next_step(&model);
        model_step(&model, step);
        writer_step(race.writer, step);
    }
    __atomic_store_n(&race.stop, 1, __ATOMIC_RELEASE);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    nsn_log_writer_close(race.writer);
    scratch_remove();
}

CHECK_MAIN()
