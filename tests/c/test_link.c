/* Links: order, room, memory, giving up, trimming, and what a lying peer can do (nothing). */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"
#include "nsn_link.h"
#include "nsn_link_layout.h"
#include "nsn_pool.h"
#include "nsn_shared.h"

#define ANY UINT64_MAX /* limit stamp */

#ifdef __SANITIZE_THREAD__
#define LESS 10u /* what has one thread is not what it looks at */
#else
#define LESS 1u
#endif
#define SCRIBBLE_NS (2500000000u / LESS)

struct pair {
    struct nsn_link_out *out;
    struct nsn_link_in *in;
    struct nsn_pool *pool;
    int fd;
};

static struct pair open_pair(uint64_t limit)
{
    struct pair pair = {0};
    char error[256] = "";
    CHECK_EQUAL(nsn_link_out_create(&pair.out, 7, limit, &pair.fd, error, sizeof error), 0);
    CHECK_EQUAL(nsn_link_in_map(&pair.in, pair.fd, 7, error, sizeof error), 0);
    pair.pool = nsn_pool_new();
    return pair;
}

static void close_pair(struct pair *pair)
{
    nsn_link_in_destroy(pair->in);
    nsn_link_out_destroy(pair->out, pair->pool);
    nsn_pool_free(pair->pool);
    close(pair->fd);
}

static uint64_t memory_of(const struct pair *pair)
{
    struct stat status;
    CHECK_EQUAL(fstat(pair->fd, &status), 0);
    return (uint64_t)status.st_blocks * 512;
}

static uint32_t length_of(uint32_t payload) { return (uint32_t)(sizeof(struct nsn_record) + 8 + 1 + payload + 7) / 8 * 8; }

/* Writes a record for subscription `number`, its payload filled with that number's low byte. Room must have been found. */
static void write_record(struct nsn_link_out *out, uint32_t number, uint32_t payload)
{
    uint32_t length = length_of(payload);
    uint8_t *at = nsn_link_out_reserve(out, length);
    struct nsn_record record = {.length = length, .kind = NSN_RECORD_MESSAGE, .sid_count = 1, .subject_length = 1,
                                .payload_length = payload, .stamp = number};
    memcpy(at, &record, sizeof record);
    memcpy(at + sizeof record, &number, sizeof number);
    at[sizeof record + 8] = 's';
    memset(at + sizeof record + 9, (int)(number & 0xff), payload);
    nsn_link_out_commit(out);
}

static int try_write(struct nsn_link_out *out, uint32_t number, uint32_t payload)
{
    int room = nsn_link_out_room(out, length_of(payload), 0);
    if (room == 1)
        write_record(out, number, payload);
    return room;
}

static int try_write_pool_noting(struct pair *pair, uint32_t number, struct nsn_block *block, uint64_t bytes,
                                 const uint8_t **blocks)
{
    uint32_t length = length_of(sizeof(struct nsn_pool_ref));
    int room = nsn_link_out_room(pair->out, length, bytes);
    if (room != 1)
        return room;
    uint8_t *at = nsn_link_out_reserve(pair->out, length);
    struct nsn_record record = {.length = length, .kind = NSN_RECORD_MESSAGE, .flags = NSN_RECORD_POOL, .sid_count = 1,
                                .subject_length = 1, .payload_length = bytes, .stamp = number};
    struct nsn_pool_ref ref = {.segment = block->segment, .offset = block->offset};
    nsn_link_out_refer(pair->out, block, bytes, &ref);
    if (blocks)
        blocks[ref.ref] = block->data;
    memcpy(at, &record, sizeof record);
    memcpy(at + sizeof record, &number, sizeof number);
    memcpy(at + sizeof record + 8, &ref, sizeof ref);
    at[sizeof record + 8 + sizeof ref] = 's';
    nsn_link_out_commit(pair->out);
    return 1;
}

static int try_write_pool(struct pair *pair, uint32_t number, struct nsn_block *block, uint64_t bytes)
{
    return try_write_pool_noting(pair, number, block, bytes, NULL);
}

/* Reads one record and checks it; -EPROTO or 0 are handed on. */
static int read_record(struct nsn_link_in *in, uint32_t number, uint32_t payload)
{
    struct nsn_record_view view;
    int code = nsn_link_in_peek(in, &view, ANY);
    if (code != 1)
        return code;
    CHECK_EQUAL(view.sids[0], number);
    CHECK_EQUAL(view.record.payload_length, payload);
    CHECK_EQUAL(view.subject[0], 's');
    for (uint32_t i = 0; i < payload; i++)
        if (view.payload[i] != (number & 0xff))
            CHECK_EQUAL(view.payload[i], number & 0xff);
    nsn_link_in_consume(in);
    return 1;
}

static int take_pool_record(struct nsn_link_in *in, struct nsn_pool_ref *ref)
{
    struct nsn_record_view view;
    int code = nsn_link_in_peek(in, &view, ANY);
    if (code != 1)
        return code;
    CHECK(view.record.flags & NSN_RECORD_POOL);
    CHECK(view.payload == NULL);
    *ref = view.pool_ref;
    nsn_link_in_consume(in);
    return 1;
}

static uint32_t mixed_size(uint32_t number) { return number * 2654435761u % 97 < 3 ? number % 16000 : number % 300; }

static uint64_t random_next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* --- order and content --------------------------------------------------------------------------------------------- */

TEST(records_arrive_in_order_with_every_byte)
{
    struct pair pair = open_pair(0);
    uint32_t written = 0, read = 0;
    while (read < 200000 / LESS) {
        for (int i = 0; i < 100; i++, written++)
            CHECK_EQUAL(try_write(pair.out, written, mixed_size(written)), 1);
        for (int i = 0; i < 100; i++, read++)
            CHECK_EQUAL(read_record(pair.in, read, mixed_size(read)), 1);
        nsn_link_in_publish(pair.in);
    }
    CHECK(nsn_link_in_empty(pair.in));
    CHECK_EQUAL(nsn_link_out_behind(pair.out), 0);
    CHECK(memory_of(&pair) < 6 * 65536); /* it never walks on through its memory */
    close_pair(&pair);
}

TEST(a_record_has_all_its_parts)
{
    struct pair pair = open_pair(0);
    uint32_t sids[3] = {11, 22, 33};
    struct nsn_record record = {.length = 32 + 16 + 3 + 2 + 4 + 5 + 2, .kind = NSN_RECORD_MESSAGE, .stamp = 99,
                                .flags = NSN_RECORD_PASSED_ON, .sid_count = 3, .subject_length = 3, .reply_length = 2,
                                .header_length = 4, .payload_length = 5};
    CHECK_EQUAL(record.length % 8, 0);
    CHECK_EQUAL(nsn_link_out_room(pair.out, record.length, 0), 1);
    uint8_t *at = nsn_link_out_reserve(pair.out, record.length);
    memcpy(at, &record, sizeof record);
    memcpy(at + 32, sids, sizeof sids);
    memcpy(at + 48, "a.brrhhhhppppp", 14);
    struct nsn_record_view view;
    CHECK_EQUAL(nsn_link_in_peek(pair.in, &view, ANY), 0); /* reserved is not visible */
    uint32_t before = nsn_link_out_tail32(pair.out);
    nsn_link_out_commit(pair.out);
    CHECK(nsn_link_out_tail32(pair.out) != before);
    uint64_t stamp = 0;
    CHECK_EQUAL(nsn_link_in_stamp(pair.in, &stamp), 1);
    CHECK_EQUAL(stamp, 99);
    CHECK_EQUAL(nsn_link_in_peek(pair.in, &view, 98), 0); /* later than asked for */
    for (int again = 0; again < 2; again++) {
        CHECK_EQUAL(nsn_link_in_peek(pair.in, &view, 99), 1);
        CHECK_EQUAL(memcmp(view.sids, sids, sizeof sids), 0);
        CHECK_EQUAL(memcmp(view.subject, "a.b", 3), 0);
        CHECK_EQUAL(memcmp(view.reply, "rr", 2), 0);
        CHECK_EQUAL(memcmp(view.headers, "hhhh", 4), 0);
        CHECK_EQUAL(memcmp(view.payload, "ppppp", 5), 0);
        CHECK_EQUAL(view.record.flags, NSN_RECORD_PASSED_ON);
    }
    nsn_link_in_consume(pair.in);
    CHECK_EQUAL(nsn_link_in_peek(pair.in, &view, ANY), 0);
    CHECK_EQUAL(nsn_link_in_head(pair.in), record.length);
    CHECK_EQUAL(nsn_link_in_tail(pair.in), record.length);
    close_pair(&pair);
}

TEST(an_uncommitted_record_is_replaced_by_the_next)
{
    struct pair pair = open_pair(0);
    uint32_t number = 0;
    while (nsn_link_out_tail32(pair.out) < (NSN_LINK_CHUNK - 4096) / 8)
        CHECK_EQUAL(try_write(pair.out, number++, 1000), 1);
    CHECK_EQUAL(nsn_link_out_room(pair.out, 8192, 0), 1);
    memset(nsn_link_out_reserve(pair.out, 8192), 0xff, 8192); /* does not fit: a new chunk is begun for it, and left empty */
    CHECK_EQUAL(nsn_link_in_behind(pair.in), nsn_link_out_tail32(pair.out) * 8u);
    for (uint32_t i = 0; i < number; i++)
        CHECK_EQUAL(read_record(pair.in, i, 1000), 1);
    nsn_link_in_publish(pair.in);
    CHECK(nsn_link_in_trim_begin(pair.in)); /* now the producer may not use that chunk */
    CHECK_EQUAL(try_write(pair.out, number, 7000), 1);
    nsn_link_in_trim_end(pair.in, true);
    CHECK_EQUAL(try_write(pair.out, number + 1, 7000), 1);
    CHECK_EQUAL(read_record(pair.in, number, 7000), 1);
    CHECK_EQUAL(read_record(pair.in, number + 1, 7000), 1);
    CHECK(nsn_link_in_empty(pair.in));
    close_pair(&pair);
}

TEST(records_fill_chunks_to_the_last_byte)
{
    struct pair pair = open_pair(0);
    uint32_t payload = 4096 - 41; /* records of 4096 bytes */
    for (uint32_t i = 0; i < 64; i++) {
        CHECK_EQUAL(try_write(pair.out, i, payload), 1);
        if (i % 3)
            continue;
        while (read_record(pair.in, (uint32_t)(nsn_link_in_head(pair.in) / 4096), payload) == 1)
            ;
        nsn_link_in_publish(pair.in);
    }
    CHECK_EQUAL(nsn_link_in_tail(pair.in), 64 * 4096);
    close_pair(&pair);
}

TEST(segment_gone_is_a_record_without_subscriptions)
{
    struct pair pair = open_pair(0);
    struct nsn_record record = {.length = 56, .kind = NSN_RECORD_SEGMENT_GONE, .flags = NSN_RECORD_POOL};
    struct nsn_pool_ref ref = {.segment = 512};
    CHECK_EQUAL(nsn_link_out_room(pair.out, 56, 0), 1);
    uint8_t *at = nsn_link_out_reserve(pair.out, 56);
    memcpy(at, &record, sizeof record);
    memcpy(at + sizeof record, &ref, sizeof ref);
    nsn_link_out_commit(pair.out);
    struct nsn_record_view view;
    CHECK_EQUAL(nsn_link_in_peek(pair.in, &view, ANY), 1);
    CHECK_EQUAL(view.record.kind, NSN_RECORD_SEGMENT_GONE);
    CHECK_EQUAL(view.pool_ref.segment, 512);
    nsn_link_in_consume(pair.in);
    nsn_link_in_publish(pair.in);
    CHECK_EQUAL(nsn_link_out_behind(pair.out), 0);
    close_pair(&pair);
}

/* --- room ---------------------------------------------------------------------------------------------------------- */

TEST(a_link_holds_its_whole_limit_wherever_the_positions_stand)
{
    struct pair pair = open_pair(0);
    for (uint32_t start = 0; start < (LESS == 1 ? 5 : 1); start++) {
        uint64_t behind = 0;
        uint32_t written = 0;
        const uint32_t payload = 16000;
        while (try_write(pair.out, written, payload) == 1)
            behind += length_of(payload), written++;
        CHECK_EQUAL(nsn_link_out_behind(pair.out), behind);
        CHECK(behind + length_of(payload) > NSN_LINK_LIMIT && behind <= NSN_LINK_LIMIT);
        CHECK(nsn_link_out_touched(pair.out) + 65536 >= memory_of(&pair));
        for (uint32_t i = 0; i < written; i++) {
            CHECK_EQUAL(read_record(pair.in, i, payload), 1);
            if (i % 50 == start)
                nsn_link_in_publish(pair.in);
        }
        nsn_link_in_publish(pair.in);
        CHECK_EQUAL(nsn_link_out_behind(pair.out), 0);
        CHECK(memory_of(&pair) <= (NSN_LINK_KEEP + 2) * 65536); /* what was above is given back */
        CHECK_EQUAL(try_write(pair.out, 1, 100 + start * 5000), 1);
        CHECK_EQUAL(read_record(pair.in, 1, 100 + start * 5000), 1);
        nsn_link_in_publish(pair.in);
    }
    close_pair(&pair);
}

TEST(an_empty_link_admits_one_message_of_any_size)
{
    struct pair pair = open_pair(4096);
    struct nsn_block *block;
    CHECK_EQUAL(nsn_pool_take(pair.pool, 64 << 20, 1 << 28, &block), 0);
    CHECK_EQUAL(try_write_pool(&pair, 1, block, 64 << 20), 1);
    CHECK_EQUAL(nsn_link_out_room(pair.out, 64, 0), 0);
    CHECK(nsn_link_out_behind(pair.out) > 64 << 20);
    struct nsn_pool_ref ref;
    CHECK_EQUAL(take_pool_record(pair.in, &ref), 1);
    CHECK_EQUAL(nsn_link_out_room(pair.out, 64, 0), 0); /* read, but not published */
    nsn_link_in_publish(pair.in);
    CHECK_EQUAL(nsn_link_out_room(pair.out, 64, 0), 1);
    CHECK_EQUAL(nsn_link_out_behind(pair.out), 0);
    CHECK_EQUAL(nsn_link_out_pinned(pair.out), 64 << 20); /* the block is still borrowed */
    nsn_block_drop(pair.pool, block, 1);
    CHECK_EQUAL(block->holds, 1);
    nsn_link_in_release(pair.in, ref.ref, ref.use);
    CHECK_EQUAL(nsn_link_out_reap(pair.out, pair.pool, false), 1);
    CHECK_EQUAL(block->holds, 0);
    CHECK_EQUAL(nsn_link_out_pinned(pair.out), 0);
    close_pair(&pair);
}

TEST(room_for_several_records_is_room_for_each_of_them)
{
    struct pair pair = open_pair(0);
    uint32_t payload = 16000, each = length_of(16000), written = 0;
    while (nsn_link_out_room(pair.out, 10 * each, 0) == 1)
        for (int i = 0; i < 10; i++)
            write_record(pair.out, written++, payload);
    CHECK(written * (uint64_t)each > NSN_LINK_LIMIT - 10 * each);
    for (uint32_t i = 0; i < written; i++)
        CHECK_EQUAL(read_record(pair.in, i, payload), 1);
    close_pair(&pair);

    pair = open_pair(0);
    struct nsn_block *block;
    CHECK_EQUAL(nsn_pool_take(pair.pool, 100, 1 << 28, &block), 0);
    while (nsn_link_out_room(pair.out, 10 * 320, 1000) == 1)
        for (int i = 0; i < 10; i++)
            CHECK_EQUAL(try_write_pool(&pair, 1, block, 100), 1);
    CHECK(nsn_link_out_pinned(pair.out) / 100 + 10 > NSN_LINK_REFS);
    close_pair(&pair);
}

TEST(references_come_back_in_any_order)
{
    struct pair pair = open_pair(0);
    struct nsn_block *block;
    static struct nsn_pool_ref refs[NSN_LINK_REFS];
    CHECK_EQUAL(nsn_pool_take(pair.pool, 100, 1 << 28, &block), 0);
    uint64_t seed = 12345;
    for (int round = 0; round < 3; round++) {
        for (uint32_t i = 0; i < NSN_LINK_REFS; i++) {
            CHECK_EQUAL(try_write_pool(&pair, i, block, 100), 1);
            CHECK_EQUAL(take_pool_record(pair.in, &refs[i]), 1);
        }
        nsn_link_in_publish(pair.in);
        CHECK_EQUAL(try_write_pool(&pair, 0, block, 100), 0);     /* none is left */
        CHECK_EQUAL(nsn_link_out_room(pair.out, 64, 0), 1);       /* which is nothing to a small message */
        CHECK_EQUAL(block->holds, NSN_LINK_REFS + 1);
        for (uint32_t i = NSN_LINK_REFS; i > 1; i--) {
            uint32_t other = (uint32_t)(random_next(&seed) % i);
            struct nsn_pool_ref swap = refs[i - 1];
            refs[i - 1] = refs[other];
            refs[other] = swap;
        }
        uint64_t reaped = 0;
        for (uint32_t i = 0; i < NSN_LINK_REFS / 2; i++) {
            nsn_link_in_release(pair.in, refs[i].ref, refs[i].use);
            reaped += nsn_link_out_reap(pair.out, pair.pool, false);
        }
        CHECK(reaped > NSN_LINK_REFS / 4); /* a quick look finds much of it */
        reaped += nsn_link_out_reap(pair.out, pair.pool, true);
        CHECK_EQUAL(reaped, NSN_LINK_REFS / 2);
        CHECK_EQUAL(try_write_pool(&pair, 0, block, 100), 1);
        struct nsn_pool_ref one;
        CHECK_EQUAL(take_pool_record(pair.in, &one), 1);
        nsn_link_in_release(pair.in, refs[0].ref, refs[0].use); /* once more: its word may be another's by now */
        CHECK_EQUAL(nsn_link_out_reap(pair.out, pair.pool, true), 0);
        nsn_link_in_release(pair.in, one.ref, one.use);
        for (uint32_t i = NSN_LINK_REFS / 2; i < NSN_LINK_REFS; i++)
            nsn_link_in_release(pair.in, refs[i].ref, refs[i].use);
        nsn_link_out_reap(pair.out, pair.pool, true);
        CHECK_EQUAL(block->holds, 1);
    }
    close_pair(&pair);
}

TEST(destroying_a_link_drops_what_it_refers_to)
{
    struct pair pair = open_pair(0);
    struct nsn_block *block;
    CHECK_EQUAL(nsn_pool_take(pair.pool, 100, 1 << 28, &block), 0);
    for (int i = 0; i < 5; i++)
        CHECK_EQUAL(try_write_pool(&pair, 0, block, 100), 1);
    nsn_link_out_destroy(pair.out, pair.pool);
    CHECK_EQUAL(block->holds, 1);
    struct nsn_pool_ref ref;
    for (int i = 0; i < 5; i++)
        CHECK_EQUAL(take_pool_record(pair.in, &ref), 1); /* what was published is still there */
    nsn_link_in_destroy(pair.in);
    nsn_pool_free(pair.pool);
    close(pair.fd);
}

/* --- waiting ------------------------------------------------------------------------------------------------------- */

TEST(a_waiting_producer_is_rung_once_when_half_is_free)
{
    struct pair pair = open_pair(1 << 20);
    uint32_t written = 0;
    while (try_write(pair.out, written, 1000) == 1)
        written++;
    CHECK_EQUAL(nsn_link_out_want(pair.out, length_of(1000), 0), 0);
    uint32_t rung = 0, rung_at = 0;
    for (uint32_t i = 0; i < written; i++) {
        CHECK_EQUAL(read_record(pair.in, i, 1000), 1);
        if (nsn_link_in_publish(pair.in) == 1)
            rung++, rung_at = i;
    }
    CHECK_EQUAL(rung, 1);
    CHECK(rung_at + 2 > written / 2 && rung_at < written / 2 + 2);
    CHECK_EQUAL(nsn_link_out_want(pair.out, length_of(1000), 0), 1); /* room already */
    nsn_link_out_unwant(pair.out);
    CHECK_EQUAL(try_write(pair.out, 0, 1000), 1);
    CHECK_EQUAL(read_record(pair.in, 0, 1000), 1);
    CHECK_EQUAL(nsn_link_in_publish(pair.in), 0); /* it no longer wants */
    close_pair(&pair);
}

TEST(a_producer_without_references_is_rung_by_releases)
{
    struct pair pair = open_pair(0);
    struct nsn_block *block;
    static struct nsn_pool_ref refs[NSN_LINK_REFS];
    CHECK_EQUAL(nsn_pool_take(pair.pool, 100, 1 << 28, &block), 0);
    for (uint32_t i = 0; i < NSN_LINK_REFS; i++) {
        CHECK_EQUAL(try_write_pool(&pair, i, block, 100), 1);
        CHECK_EQUAL(take_pool_record(pair.in, &refs[i]), 1);
    }
    CHECK_EQUAL(nsn_link_in_publish(pair.in), 0);
    CHECK_EQUAL(nsn_link_out_want(pair.out, 64, 100), 0);
    CHECK_EQUAL(nsn_link_in_publish(pair.in), 0);
    nsn_link_in_release(pair.in, refs[9].ref, refs[9].use);
    CHECK_EQUAL(nsn_link_in_publish(pair.in), 1); /* the link is empty: one is enough */
    CHECK_EQUAL(nsn_link_out_want(pair.out, 64, 100), 1);
    CHECK_EQUAL(nsn_link_out_reap(pair.out, pair.pool, true), 1);
    CHECK_EQUAL(nsn_link_out_room(pair.out, 64, 100), 1);
    close_pair(&pair);
}

TEST(a_producer_that_needs_memory_is_rung_by_releases_or_progress)
{
    struct pair pair = open_pair(0);
    struct nsn_block *block;
    struct nsn_pool_ref refs[3];
    CHECK_EQUAL(nsn_link_out_want_memory(pair.out), 1); /* nothing that could come back */
    CHECK_EQUAL(nsn_pool_take(pair.pool, 1 << 20, 1 << 28, &block), 0);
    for (int i = 0; i < 3; i++)
        CHECK_EQUAL(try_write_pool(&pair, 0, block, 1 << 20), 1);
    CHECK_EQUAL(nsn_link_out_want_memory(pair.out), 0);
    CHECK_EQUAL(take_pool_record(pair.in, &refs[0]), 1);
    CHECK_EQUAL(nsn_link_in_publish(pair.in), 0);
    CHECK_EQUAL(take_pool_record(pair.in, &refs[1]), 1);
    CHECK_EQUAL(nsn_link_in_publish(pair.in), 1); /* half was read */
    CHECK_EQUAL(nsn_link_out_want_memory(pair.out), 0);
    nsn_link_in_release(pair.in, refs[1].ref, refs[1].use);
    CHECK_EQUAL(nsn_link_in_publish(pair.in), 1);
    CHECK_EQUAL(nsn_link_out_want_memory(pair.out), 1);
    close_pair(&pair);
}

/* --- giving up ----------------------------------------------------------------------------------------------------- */

TEST(a_stalled_link_is_discarded_and_runs_again)
{
    struct pair pair = open_pair(1 << 16);
    uint32_t written = 0;
    while (try_write(pair.out, written, 1000) == 1)
        written++;
    CHECK_EQUAL(nsn_link_in_stalled(pair.in), 0);
    CHECK(!nsn_link_out_stalled(pair.out));
    nsn_link_out_stall(pair.out);
    nsn_link_out_stall(pair.out); /* the same */
    CHECK(nsn_link_out_stalled(pair.out));
    nsn_link_out_drop(pair.out, 5);
    nsn_link_out_drop(pair.out, 2);
    uint64_t until = nsn_link_in_stalled(pair.in), dropped = 0;
    CHECK_EQUAL(until, nsn_link_in_tail(pair.in));
    struct nsn_record_view view;
    while (nsn_link_in_head(pair.in) < until) {
        CHECK_EQUAL(nsn_link_in_peek(pair.in, &view, ANY), 1);
        nsn_link_in_consume(pair.in);
    }
    nsn_link_in_publish(pair.in);
    CHECK(nsn_link_out_stalled(pair.out));
    nsn_link_in_acknowledge_stall(pair.in, &dropped);
    CHECK_EQUAL(dropped, 7);
    CHECK_EQUAL(nsn_link_in_stalled(pair.in), 0);
    CHECK(!nsn_link_out_stalled(pair.out));
    CHECK_EQUAL(try_write(pair.out, 1, 1000), 1);
    CHECK_EQUAL(read_record(pair.in, 1, 1000), 1);
    close_pair(&pair);
}

/* --- memory -------------------------------------------------------------------------------------------------------- */

TEST(memory_follows_the_backlog_of_a_link_that_is_never_empty)
{
    struct pair pair = open_pair(0);
    uint32_t written = 0, read = 0, behind = 10000; /* about 1 MiB */
    for (; written < behind; written++)
        CHECK_EQUAL(try_write(pair.out, written, 64), 1);
    for (; read < 500000 / LESS; written++, read++) {
        CHECK_EQUAL(try_write(pair.out, written, 64), 1);
        CHECK_EQUAL(read_record(pair.in, read, 64), 1);
        if (read % 16 == 0)
            nsn_link_in_publish(pair.in);
    }
    CHECK(memory_of(&pair) <= (NSN_LINK_KEEP + 4) * 65536);
    CHECK(nsn_link_out_touched(pair.out) >= memory_of(&pair));
    close_pair(&pair);
}

/* Called when the consumer gives memory back. */
static void (*before_giving_back)(void *), (*after_giving_back)(void *);
static void *hook_argument;

int madvise(void *start, size_t length, int advice)
{
    if (advice == MADV_REMOVE && before_giving_back) {
        void (*call)(void *) = before_giving_back;
        before_giving_back = NULL;
        call(hook_argument);
        before_giving_back = call;
    }
    int code = (int)syscall(SYS_madvise, start, length, advice);
    if (advice == MADV_REMOVE && after_giving_back)
        after_giving_back(hook_argument);
    return code;
}

struct writer { struct nsn_link_out *out; uint32_t written; };

static void write_many(void *argument)
{
    struct writer *writer = argument;
    for (int i = 0; i < 100; i++, writer->written++)
        CHECK_EQUAL(try_write(writer->out, writer->written, 8000), 1);
}

TEST(memory_is_given_back_before_the_position_that_frees_it)
{
    struct pair pair = open_pair(0);
    struct writer writer = {pair.out, 0};
    for (int i = 0; i < 20; i++)
        write_many(&writer);
    hook_argument = &writer;
    before_giving_back = write_many; /* the producer is quick to take what it believes to be free */
    for (uint32_t read = 0; read < 2000; read++) {
        CHECK_EQUAL(read_record(pair.in, read, 8000), 1);
        if (read % 40 == 0)
            nsn_link_in_publish(pair.in);
    }
    before_giving_back = NULL;
    for (uint32_t read = 2000; read < writer.written; read++)
        CHECK_EQUAL(read_record(pair.in, read, 8000), 1);
    CHECK(writer.written > 3000);
    close_pair(&pair);
}

TEST(an_idle_link_keeps_three_pages)
{
    struct pair pair = open_pair(0);
    for (uint32_t round = 1; round < 30; round++) {
        uint32_t count = round * 997 % 20000;
        for (uint32_t i = 0; i < count; i++)
            CHECK_EQUAL(try_write(pair.out, i, mixed_size(i) % 2000), 1);
        for (uint32_t i = 0; i < count; i++)
            CHECK_EQUAL(read_record(pair.in, i, mixed_size(i) % 2000), 1);
        CHECK(!nsn_link_in_trim_begin(pair.in)); /* not published yet */
        nsn_link_in_publish(pair.in);
        if (nsn_link_in_trim_begin(pair.in)) {
            CHECK(nsn_link_in_trim_end(pair.in, true) > 0);
            CHECK(!nsn_link_in_trim_begin(pair.in)); /* nothing more to give */
        }
        CHECK(memory_of(&pair) <= 40960);
        CHECK_EQUAL(nsn_link_out_room(pair.out, 64, 0), 1);
        CHECK(nsn_link_out_touched(pair.out) <= 40960);
        CHECK(nsn_link_out_touched(pair.out) + 8192 >= memory_of(&pair));
    }
    close_pair(&pair);
}

static void read_the_rest(void *argument)
{
    struct nsn_link_in *reader;
    char error[256] = "";
    CHECK_EQUAL(nsn_link_out_reader(argument, &reader, error, sizeof error), 0);
    for (uint32_t read = 1500; read < 2000; read++)
        CHECK_EQUAL(read_record(reader, read, 8000), 1);
    CHECK(nsn_link_in_empty(reader));
    nsn_link_in_destroy(reader);
}

TEST(what_a_dead_consumer_had_not_read_is_found_wherever_it_died)
{
    struct pair pair = open_pair(0);
    struct writer writer = {pair.out, 0};
    for (int i = 0; i < 20; i++)
        write_many(&writer);
    for (uint32_t read = 0; read < 1500; read++)
        CHECK_EQUAL(read_record(pair.in, read, 8000), 1);
    hook_argument = pair.out;
    after_giving_back = read_the_rest;
    nsn_link_in_publish(pair.in);
    after_giving_back = NULL;
    read_the_rest(pair.out);
    close_pair(&pair);
}

static long page_table_kib(void)
{
    char line[256];
    long kib = -1;
    FILE *status = fopen("/proc/self/status", "r");
    CHECK(status);
    while (fgets(line, sizeof line, status))
        sscanf(line, "VmPTE: %ld", &kib);
    fclose(status);
    return kib;
}

TEST(an_idle_link_that_was_full_costs_what_a_new_one_costs)
{
    struct pair pair = open_pair(0);
    long before_kib = page_table_kib();
    uint32_t written = 0;
    while (try_write(pair.out, written, 8000) == 1)
        written++;
    for (uint32_t read = 0; read < written; read++) {
        CHECK_EQUAL(read_record(pair.in, read, 8000), 1);
        nsn_link_in_publish(pair.in);
    }
    long full_kib = page_table_kib();
    CHECK(nsn_link_in_trim_begin(pair.in));
    CHECK(nsn_link_in_trim_end(pair.in, true) > 0);
    nsn_link_out_touched(pair.out);
    CHECK(memory_of(&pair) <= 40960);
    long after_kib = page_table_kib();
    if (after_kib > before_kib + 24) /* kernels before 6.14 keep page tables */
        printf("   page tables: %ld KiB, full %ld KiB, idle %ld KiB\n", before_kib, full_kib, after_kib);
    CHECK(after_kib <= full_kib);
    CHECK(!nsn_link_in_trim_begin(pair.in));
    CHECK_EQUAL(try_write(pair.out, 1, 8000), 1);
    CHECK_EQUAL(read_record(pair.in, 1, 8000), 1);
    close_pair(&pair);
}

TEST(the_reference_table_is_given_back_when_nothing_is_out)
{
    struct pair pair = open_pair(0);
    struct nsn_block *block;
    static struct nsn_pool_ref refs[NSN_LINK_REFS];
    CHECK_EQUAL(nsn_pool_take(pair.pool, 100, 1 << 28, &block), 0);
    for (int round = 0; round < 2; round++) {
        for (uint32_t i = 0; i < NSN_LINK_REFS; i++) {
            CHECK_EQUAL(try_write_pool(&pair, i, block, 100), 1);
            CHECK_EQUAL(take_pool_record(pair.in, &refs[i]), 1);
        }
        for (uint32_t i = 0; i < NSN_LINK_REFS; i++)
            nsn_link_in_release(pair.in, refs[i].ref, refs[i].use);
        nsn_link_in_publish(pair.in);
        CHECK(nsn_link_in_trim_begin(pair.in));
        nsn_link_in_trim_end(pair.in, true);
        CHECK(memory_of(&pair) > 40960);                              /* the producer has not read the words yet … */
        CHECK_EQUAL(nsn_link_out_reap(pair.out, pair.pool, true), NSN_LINK_REFS); /* … and must still find them */
        CHECK(nsn_link_in_trim_begin(pair.in));
        nsn_link_in_trim_end(pair.in, true);
        CHECK(memory_of(&pair) <= 40960);
        CHECK_EQUAL(block->holds, 1);
    }
    close_pair(&pair);
}

TEST(publishing_goes_on_while_memory_is_given_back)
{
    struct pair pair = open_pair(0);
    uint32_t written = 0, read = 0;
    uint64_t seed = 99;
    for (int round = 0; round < 3000 / (int)LESS; round++) {
        uint32_t batch = (uint32_t)(random_next(&seed) % 60);
        for (uint32_t i = 0; i < batch; i++, written++)
            CHECK_EQUAL(try_write(pair.out, written, mixed_size(written)), 1);
        bool begun = random_next(&seed) % 2 && nsn_link_in_trim_begin(pair.in);
        if (random_next(&seed) % 2)
            for (uint32_t i = 0; i < 3; i++, written++)
                CHECK_EQUAL(try_write(pair.out, written, mixed_size(written)), 1);
        for (uint32_t some = random_next(&seed) % 4 == 0; some && read < written; some--, read++)
            CHECK_EQUAL(read_record(pair.in, read, mixed_size(read)), 1);
        if (begun && random_next(&seed) % 8)
            nsn_link_in_trim_end(pair.in, random_next(&seed) % 4);
        for (; read < written; read++)
            CHECK_EQUAL(read_record(pair.in, read, mixed_size(read)), 1);
        nsn_link_in_publish(pair.in);
    }
    CHECK(nsn_link_in_empty(pair.in));
    close_pair(&pair);
}

/* --- handing over -------------------------------------------------------------------------------------------------- */

TEST(only_a_sealed_link_of_the_right_name_is_mapped)
{
    struct nsn_link_out *out;
    struct nsn_link_in *in;
    int fd;
    char error[256] = "";
    CHECK_EQUAL(nsn_link_out_create(&out, 7, 0, &fd, error, sizeof error), 0);
    CHECK(!nsn_link_out_taken(out));
    CHECK_EQUAL(nsn_link_in_map(&in, fd, 8, error, sizeof error), -EPROTO);
    CHECK(strstr(error, "link 8"));
    CHECK(!nsn_link_out_taken(out));
    CHECK_EQUAL(nsn_link_in_map(&in, fd, 7, error, sizeof error), 0);
    CHECK(nsn_link_out_taken(out));
    nsn_link_in_destroy(in);
    nsn_link_out_destroy(out, NULL);
    close(fd);

    int seals[] = {F_SEAL_GROW | F_SEAL_SEAL, F_SEAL_SHRINK | F_SEAL_SEAL, F_SEAL_SHRINK | F_SEAL_GROW,
                   NSN_LINK_SEALS | F_SEAL_FUTURE_WRITE, NSN_LINK_SEALS | F_SEAL_WRITE, NSN_LINK_SEALS};
    for (unsigned i = 0; i < sizeof seals / sizeof seals[0]; i++) {
        fd = memfd_create("fake", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        CHECK_EQUAL(ftruncate(fd, (off_t)sizeof(struct nsn_link_file) - (i == 5)), 0);
        CHECK_EQUAL(fcntl(fd, F_ADD_SEALS, seals[i]), 0);
        CHECK_EQUAL(nsn_link_in_map(&in, fd, 0, error, sizeof error), -EPROTO);
        close(fd);
    }
    int ends[2];
    CHECK_EQUAL(pipe(ends), 0);
    CHECK_EQUAL(nsn_link_in_map(&in, ends[0], 0, error, sizeof error), -EPROTO);
    close(ends[0]);
    close(ends[1]);
}

/* --- lying peers --------------------------------------------------------------------------------------------------- */

static struct nsn_link_file *map_again(int fd)
{
    struct nsn_link_file *file = mmap(NULL, sizeof *file, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(file != MAP_FAILED);
    return file;
}

struct lie {
    const char *name;
    struct nsn_record record;      /* written over an honest one of 128 bytes */
    struct nsn_pool_ref ref;
};

#define HONEST .length = 128, .kind = NSN_RECORD_MESSAGE, .sid_count = 1, .subject_length = 1
#define IN_POOL HONEST, .flags = NSN_RECORD_POOL, .payload_length = 10

/* A record of 128 bytes at the start of the link, another behind it; then the first is changed. */
static int peek_at(const struct lie *lie)
{
    struct pair pair = open_pair(0);
    struct nsn_link_file *file = map_again(pair.fd);
    CHECK_EQUAL(length_of(80), 128);
    CHECK_EQUAL(try_write(pair.out, 1, 80), 1);
    CHECK_EQUAL(try_write(pair.out, 2, 80), 1);
    memcpy(file->chunk[0], &lie->record, sizeof lie->record);
    memcpy(file->chunk[0] + sizeof lie->record + (lie->record.sid_count ? 8 : 0), &lie->ref, sizeof lie->ref);
    struct nsn_record_view view;
    int code = nsn_link_in_peek(pair.in, &view, ANY);
    munmap(file, sizeof *file);
    close_pair(&pair);
    return code;
}

TEST(an_impossible_record_breaks_the_link)
{
    struct lie truths[] = {
        {"honest", {HONEST, .payload_length = 80}, {0}},
        {"in the pool", {IN_POOL}, {.ref = NSN_LINK_REFS - 1, .use = 1}},
        {"a whole block", {HONEST, .flags = NSN_RECORD_POOL, .payload_length = NSN_BLOCK_MAX}, {.use = 1}},
        {"segment gone", {.length = 128, .kind = NSN_RECORD_SEGMENT_GONE, .flags = NSN_RECORD_POOL}, {.segment = 5}},
    };
    struct lie lies[] = {
        {"length 0", {.length = 0, .kind = NSN_RECORD_MESSAGE, .sid_count = 1, .subject_length = 1}, {0}},
        {"length 24", {.length = 24, .kind = NSN_RECORD_MESSAGE, .sid_count = 1, .subject_length = 1}, {0}},
        {"length 100", {.length = 100, .kind = NSN_RECORD_MESSAGE, .sid_count = 1, .subject_length = 1}, {0}},
        {"behind the tail", {.length = 264, .kind = NSN_RECORD_MESSAGE, .sid_count = 1, .subject_length = 1}, {0}},
        {"skip first", {.length = NSN_RECORD_SKIP, .kind = NSN_RECORD_MESSAGE, .sid_count = 1, .subject_length = 1}, {0}},
        {"kind 0", {.length = 128, .kind = 0, .sid_count = 1, .subject_length = 1}, {0}},
        {"kind 3", {.length = 128, .kind = 3, .sid_count = 1, .subject_length = 1}, {0}},
        {"no sids", {.length = 128, .kind = NSN_RECORD_MESSAGE, .sid_count = 0, .subject_length = 1}, {0}},
        {"65 sids", {.length = 128, .kind = NSN_RECORD_MESSAGE, .sid_count = 65, .subject_length = 1}, {0}},
        {"sids over the end", {.length = 128, .kind = NSN_RECORD_MESSAGE, .sid_count = 25, .subject_length = 1}, {0}},
        {"no subject", {.length = 128, .kind = NSN_RECORD_MESSAGE, .sid_count = 1, .subject_length = 0}, {0}},
        {"subject over the end", {.length = 128, .kind = NSN_RECORD_MESSAGE, .sid_count = 1, .subject_length = 89}, {0}},
        {"reply over the end", {HONEST, .reply_length = 88}, {0}},
        {"headers over the end", {HONEST, .header_length = 88}, {0}},
        {"payload over the end", {HONEST, .payload_length = 88}, {0}},
        {"both over the end", {HONEST, .header_length = 44, .payload_length = 44}, {0}},
        {"sum that wraps", {HONEST, .header_length = 8, .payload_length = UINT64_MAX - 7}, {0}},
        {"no such ref", {IN_POOL}, {.ref = NSN_LINK_REFS, .use = 1}},
        {"use 0", {IN_POOL}, {.use = 0}},
        {"offset that wraps", {IN_POOL}, {.use = 1, .offset = UINT64_MAX - 4}},
        {"over a block", {HONEST, .flags = NSN_RECORD_POOL, .header_length = 1, .payload_length = NSN_BLOCK_MAX}, {.use = 1}},
        {"wraps", {HONEST, .flags = NSN_RECORD_POOL, .header_length = 9, .payload_length = UINT64_MAX - 7}, {.use = 1}},
        {"ref over the end", {.length = 128, .kind = NSN_RECORD_MESSAGE, .flags = NSN_RECORD_POOL, .sid_count = 1,
                              .subject_length = 65}, {.use = 1}},
        {"gone, with sids", {.length = 128, .kind = NSN_RECORD_SEGMENT_GONE, .flags = NSN_RECORD_POOL, .sid_count = 1}, {0}},
        {"gone, without a segment", {.length = 128, .kind = NSN_RECORD_SEGMENT_GONE}, {0}},
        {"gone, with a use", {.length = 128, .kind = NSN_RECORD_SEGMENT_GONE, .flags = NSN_RECORD_POOL}, {.use = 1}},
    };
    for (unsigned i = 0; i < sizeof truths / sizeof truths[0]; i++)
        CHECK_EQUAL(peek_at(&truths[i]), 1);
    for (unsigned i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        int code = peek_at(&lies[i]);
        if (code != -EPROTO)
            fprintf(stderr, "believed: %s\n", lies[i].name);
        CHECK_EQUAL(code, -EPROTO);
    }
}

TEST(subjects_and_records_have_an_upper_limit)
{
    struct {
        uint32_t length;
        uint16_t sids, subject, reply;
        int code;
    } cases[] = {
        {8320, 1, 4096, 4096, 1}, {8320, 1, 4097, 0, -EPROTO}, {8320, 1, 1, 4097, -EPROTO},
        {NSN_RECORD_MAX, 64, 1, 1, 1}, {NSN_RECORD_MAX + 8, 1, 1, 1, -EPROTO}, {NSN_RECORD_MAX, 65, 1, 1, -EPROTO},
        {NSN_RECORD_MAX, 2000, 1, 1, -EPROTO},
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct pair pair = open_pair(0);
        struct nsn_link_file *file = map_again(pair.fd);
        for (uint32_t j = 0; j < 4; j++)
            CHECK_EQUAL(try_write(pair.out, j, 8000), 1);
        struct nsn_record record = {.length = cases[i].length, .kind = NSN_RECORD_MESSAGE, .sid_count = cases[i].sids,
                                    .subject_length = cases[i].subject, .reply_length = cases[i].reply};
        memcpy(file->chunk[0], &record, sizeof record);
        struct nsn_record_view view;
        CHECK_EQUAL(nsn_link_in_peek(pair.in, &view, ANY), cases[i].code);
        munmap(file, sizeof *file);
        close_pair(&pair);
    }
}

TEST(a_record_over_the_end_of_its_chunk_breaks_the_link)
{
    for (int skip = 0; skip < 2; skip++) {
        struct pair pair = open_pair(0);
        struct nsn_link_file *file = map_again(pair.fd);
        uint32_t written = 0, last;
        do {
            last = nsn_link_out_tail32(pair.out) * 8;
            CHECK_EQUAL(try_write(pair.out, written++, 1000), 1);
        } while (nsn_link_out_tail32(pair.out) * 8 < NSN_LINK_CHUNK);
        uint32_t end = nsn_link_out_tail32(pair.out) * 8 - NSN_LINK_CHUNK; /* of the first record in the second chunk */
        for (uint32_t i = 0; i + 1 < written; i++)
            CHECK_EQUAL(read_record(pair.in, i, 1000), 1);
        struct nsn_record lie = {HONEST, .payload_length = 1};
        lie.length = NSN_LINK_CHUNK - last + 8;
        CHECK(lie.length <= NSN_LINK_CHUNK - last + end);
        if (skip) /* one more, where there is nothing behind */
            nsn_store_release(&file->producer.tail, NSN_LINK_CHUNK);
        else
            memcpy(file->chunk[0] + last, &lie, sizeof lie);
        if (skip) {
            nsn_link_in_destroy(pair.in);
            char error[256];
            CHECK_EQUAL(nsn_link_in_map(&pair.in, pair.fd, 7, error, sizeof error), 0);
            for (uint32_t i = 0; i + 1 < written; i++)
                CHECK_EQUAL(read_record(pair.in, i, 1000), 1);
        }
        struct nsn_record_view view;
        CHECK_EQUAL(nsn_link_in_peek(pair.in, &view, ANY), -EPROTO);
        munmap(file, sizeof *file);
        close_pair(&pair);
    }
}

TEST(a_chunk_that_does_not_exist_breaks_the_link)
{
    struct pair pair = open_pair(0);
    struct nsn_link_file *file = map_again(pair.fd);
    CHECK_EQUAL(try_write(pair.out, 1, 80), 1);
    file->producer.map[0] = NSN_LINK_CHUNKS;
    struct nsn_record_view view;
    CHECK_EQUAL(nsn_link_in_peek(pair.in, &view, ANY), -EPROTO);
    munmap(file, sizeof *file);
    close_pair(&pair);
}

TEST(an_impossible_tail_breaks_the_link)
{
    uint64_t lies[] = {4, 8 + (uint64_t)NSN_LINK_CHUNKS * NSN_LINK_CHUNK, UINT64_MAX - 7, 64 /* nothing written there */};
    for (unsigned i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        struct pair pair = open_pair(0);
        struct nsn_link_file *file = map_again(pair.fd);
        struct nsn_record_view view;
        nsn_store_release(&file->producer.tail, lies[i]);
        CHECK_EQUAL(nsn_link_in_peek(pair.in, &view, ANY), -EPROTO);
        nsn_store_release(&file->producer.tail, 0);
        CHECK_EQUAL(nsn_link_in_peek(pair.in, &view, ANY), -EPROTO); /* for good */
        CHECK(!nsn_link_in_empty(pair.in));
        munmap(file, sizeof *file);
        close_pair(&pair);
    }
    struct pair pair = open_pair(0);
    struct nsn_link_file *file = map_again(pair.fd);
    CHECK_EQUAL(try_write(pair.out, 1, 10), 1);
    CHECK_EQUAL(read_record(pair.in, 1, 10), 1);
    nsn_store_release(&file->producer.tail, 8); /* backwards */
    struct nsn_record_view view;
    CHECK_EQUAL(nsn_link_in_peek(pair.in, &view, ANY), -EPROTO);
    munmap(file, sizeof *file);
    close_pair(&pair);
}

TEST(impossible_words_of_the_consumer_break_the_link)
{
    for (unsigned lie = 0; lie < 6; lie++) {
        struct pair pair = open_pair(1 << 16);
        struct nsn_link_file *file = map_again(pair.fd);
        while (try_write(pair.out, 1, 1000) == 1)
            ;
        CHECK_EQUAL(read_record(pair.in, 1, 1000), 1);
        nsn_link_in_publish(pair.in);
        CHECK(nsn_link_out_behind(pair.out) > 0);
        uint64_t tail = nsn_link_in_tail(pair.in);
        if (lie == 0)
            nsn_store_release(&file->consumer.head, tail + 8);
        if (lie == 1)
            nsn_store_release(&file->consumer.head, 0);
        if (lie == 2)
            nsn_store_release(&file->consumer.head, nsn_link_in_head(pair.in) + 4);
        if (lie == 3)
            nsn_store_release(&file->consumer.consumed, tail * 2);
        if (lie == 4)
            nsn_store_release(&file->consumer.consumed, 0);
        if (lie == 5)
            nsn_store_release(&file->consumer.head, tail); /* all read, yet not all consumed */
        CHECK_EQUAL(nsn_link_out_room(pair.out, 32768, 0), -EPROTO);
        CHECK_EQUAL(nsn_link_out_room(pair.out, 64, 0), -EPROTO);
        munmap(file, sizeof *file);
        close_pair(&pair);
    }
    struct pair pair = open_pair(0);
    struct nsn_link_file *file = map_again(pair.fd);
    nsn_link_out_stall(pair.out);
    nsn_store_release(&file->consumer.stall_acknowledged, 9);
    CHECK(!nsn_link_out_stalled(pair.out));
    CHECK_EQUAL(nsn_link_out_room(pair.out, 64, 0), -EPROTO);
    munmap(file, sizeof *file);
    close_pair(&pair);
}

static bool lies_inside(const struct nsn_link_file *file, const void *start, uint64_t length)
{
    const uint8_t *at = start, *from = (const uint8_t *)file->chunk, *to = (const uint8_t *)(file + 1);
    return at >= from && length <= (uint64_t)(to - at);
}

static uint64_t sum_of(const void *start, uint64_t length)
{
    const uint8_t *at = start;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < length; i++)
        sum += at[i];
    return sum;
}

static volatile uint64_t sink;

/* Peeks at everything and touches every byte that a view names. */
static void read_all(struct pair *pair, const struct nsn_link_file *file, uint64_t *seed)
{
    struct nsn_record_view view;
    for (int steps = 0; steps < 400; steps++) {
        uint64_t stamp;
        nsn_link_in_stamp(pair->in, &stamp);
        if (nsn_link_in_peek(pair->in, &view, ANY) != 1)
            break;
        const struct nsn_record *record = &view.record;
        CHECK(record->sid_count <= NSN_RECORD_SIDS);
        CHECK(lies_inside(file, view.subject, record->subject_length) && lies_inside(file, view.reply, record->reply_length));
        sink += sum_of(view.subject, record->subject_length) + sum_of(view.reply, record->reply_length);
        if (record->flags & (NSN_RECORD_POOL | NSN_RECORD_PARTS)) {
            CHECK(record->header_length + record->payload_length <= 72u << 20);
        } else {
            CHECK(lies_inside(file, view.headers, record->header_length));
            CHECK(lies_inside(file, view.payload, record->payload_length));
            sink += sum_of(view.headers, record->header_length) + sum_of(view.payload, record->payload_length);
        }
        if (record->flags & NSN_RECORD_PARTS && random_next(seed) % 4 && nsn_link_in_parts(pair->in, &view, NULL) != 1)
            break;
        nsn_link_in_consume(pair->in);
        if (record->flags & NSN_RECORD_POOL && record->kind == NSN_RECORD_MESSAGE)
            nsn_link_in_release(pair->in, view.pool_ref.ref, view.pool_ref.use);
        if (random_next(seed) % 8 == 0)
            nsn_link_in_publish(pair->in);
    }
    if (nsn_link_in_stalled(pair->in))
        nsn_link_in_acknowledge_stall(pair->in, &(uint64_t){0});
    nsn_link_in_publish(pair->in);
    if (nsn_link_in_trim_begin(pair->in))
        nsn_link_in_trim_end(pair->in, random_next(seed) % 2);
}

/* A word that is more likely to be believed than a random one. */
static uint64_t plausible(uint64_t *seed, uint64_t near)
{
    switch (random_next(seed) % 6) {
    case 0: return random_next(seed);
    case 1: return near + random_next(seed) % 64 * 8;
    case 2: return near - random_next(seed) % 64 * 8;
    case 3: return near + random_next(seed) % (4 * NSN_LINK_CHUNK) / 8 * 8;
    case 4: return random_next(seed) % 70000;
    default: return (near / NSN_LINK_CHUNK + random_next(seed) % 3) * NSN_LINK_CHUNK;
    }
}

static void scribble_as_producer(struct nsn_link_file *file, uint64_t tail, uint64_t *seed)
{
    uint8_t *chunk = file->chunk[random_next(seed) % 3];
    uint32_t *length = (uint32_t *)(void *)chunk + random_next(seed) % 1024 * 2;
    uint16_t physical = (uint16_t)(random_next(seed) % 4 ? random_next(seed) % 4 : random_next(seed));
    switch (random_next(seed) % 5) {
    case 0: nsn_store_release(&file->producer.tail, plausible(seed, tail)); break;
    case 1: ((uint8_t *)&file->producer)[random_next(seed) % 4096] = (uint8_t)random_next(seed); break;
    case 2: chunk[random_next(seed) % 8192] = (uint8_t)random_next(seed); break;
    case 3: *length = random_next(seed) % 2 ? NSN_RECORD_SKIP : (uint32_t)plausible(seed, 64); break;
    default: file->producer.map[random_next(seed) % 4] = physical; break;
    }
}

TEST(a_producer_that_scribbles_does_the_consumer_no_harm)
{
    uint64_t began_ns = nsn_now_ns();
    uint32_t seeds = 0;
    for (; seeds < 20000 && nsn_now_ns() - began_ns < SCRIBBLE_NS; seeds++) {
        uint64_t seed = (seeds + 1) * 0x9e3779b97f4a7c15ull;
        struct pair pair = open_pair(0);
        struct nsn_link_file *file = map_again(pair.fd);
        struct nsn_block *block;
        CHECK_EQUAL(nsn_pool_take(pair.pool, 100, 1 << 28, &block), 0);
        for (int round = 0; round < 4; round++) {
            for (uint32_t i = 0; i < 20; i++)
                if (random_next(&seed) % 4)
                    try_write(pair.out, i, (uint32_t)(random_next(&seed) % (round == 3 ? 9000 : 200)));
                else
                    try_write_pool(&pair, i, block, 100);
            if (round)
                for (uint64_t count = random_next(&seed) % 6; count; count--)
                    scribble_as_producer(file, nsn_link_out_tail32(pair.out) * 8ull, &seed);
            read_all(&pair, file, &seed);
            nsn_link_out_reap(pair.out, pair.pool, true);
        }
        munmap(file, sizeof *file);
        close_pair(&pair);
    }
    printf("   %u seeds\n", seeds);
}

static void scribble_as_consumer(struct nsn_link_file *file, uint64_t tail, uint64_t *seed)
{
    uint64_t *words[] = {&file->consumer.head, &file->consumer.consumed, &file->consumer.trim, &file->consumer.trimmed,
                         &file->consumer.stall_acknowledged};
    if (random_next(seed) % 3)
        nsn_store_release(words[random_next(seed) % 5], random_next(seed) % 3 ? plausible(seed, tail) : random_next(seed) % 4);
    else
        nsn_store_release32(&file->consumer.released[random_next(seed) % 24], (uint32_t)(random_next(seed) % 4));
    if (random_next(seed) % 4 == 0)
        memset(file->chunk[random_next(seed) % 4], (int)random_next(seed), NSN_LINK_CHUNK); /* never read back */
    if (random_next(seed) % 4 == 0)
        memset(&file->producer, (int)random_next(seed), 4096);
}

TEST(a_consumer_that_scribbles_does_the_producer_no_harm)
{
    uint64_t began_ns = nsn_now_ns();
    uint32_t seeds = 0;
    for (; seeds < 20000 && nsn_now_ns() - began_ns < SCRIBBLE_NS; seeds++) {
        uint64_t seed = (seeds + 1) * 0x9e3779b97f4a7c15ull;
        struct pair pair = open_pair(1 << (14 + seeds % 8));
        struct nsn_link_file *file = map_again(pair.fd);
        struct nsn_block *block;
        CHECK_EQUAL(nsn_pool_take(pair.pool, 100, 1 << 28, &block), 0);
        for (int round = 0; round < 30; round++) {
            int code = 0;
            for (uint32_t i = 0; i < 10 && code >= 0; i++)
                code = random_next(&seed) % 4 ? try_write(pair.out, i, (uint32_t)(random_next(&seed) % 9000))
                                               : try_write_pool(&pair, i, block, 100);
            scribble_as_consumer(file, nsn_link_out_tail32(pair.out) * 8ull, &seed);
            nsn_link_out_reap(pair.out, pair.pool, random_next(&seed) % 2);
            if (nsn_link_out_want(pair.out, 1000, 100) == 0)
                nsn_link_out_want_memory(pair.out);
            nsn_link_out_unwant(pair.out);
            if (random_next(&seed) % 8 == 0)
                nsn_link_out_stall(pair.out);
            nsn_link_out_stalled(pair.out);
            CHECK(nsn_link_out_touched(pair.out) <= sizeof(struct nsn_link_file));
            CHECK(nsn_link_out_pinned(pair.out) == 100ull * (block->holds - 1));
            if (code < 0)
                break;
        }
        munmap(file, sizeof *file);
        close_pair(&pair);
    }
    printf("   %u seeds\n", seeds);
}

/* --- two threads --------------------------------------------------------------------------------------------------- */

#define STRESS 60000u

struct stress {
    struct pair pair;
    uint64_t publishing;           /* the producer's "inside a publish" word */
    uint64_t ring;                 /* rings that the consumer owed */
    bool read_blocks;              /* ThreadSanitizer would not see what orders that when the link is mapped twice */
    const uint8_t *blocks[NSN_LINK_REFS]; /* where the block of a reference lies: written before the record is committed */
    uint64_t trims;
};

static void *produce(void *argument)
{
    struct stress *stress = argument;
    struct pair *pair = &stress->pair;
    uint64_t seed = 5;
    for (uint32_t number = 0; number < STRESS;) {
        nsn_store_relaxed(&stress->publishing, 1);
        nsn_fence(); /* with the one in nsn_link_in_trim_begin */
        int code;
        if (number % 64 == 0) {
            struct nsn_block *block;
            nsn_link_out_reap(pair->out, pair->pool, number % 1024 == 0);
            CHECK_EQUAL(nsn_pool_take(pair->pool, 5000, 1ull << 30, &block), 0);
            memset(block->data, (int)(number / 64 & 0xff), 5000);
            code = try_write_pool_noting(pair, number, block, 5000, stress->blocks);
            nsn_block_drop(pair->pool, block, nsn_now_ns());
        } else {
            code = try_write(pair->out, number, mixed_size(number));
        }
        nsn_store_release(&stress->publishing, 0);
        CHECK(code >= 0);
        if (code == 1) {
            number++;
            if (random_next(&seed) % 512 == 0) { /* let the link become empty and idle */
                while (nsn_link_out_behind(pair->out))
                    sched_yield();
                for (uint64_t spins = random_next(&seed) % 40; spins; spins--)
                    sched_yield();
            }
            continue;
        }
        nsn_link_out_reap(pair->out, pair->pool, true);
        uint64_t rings = nsn_load_acquire(&stress->ring);
        if (nsn_link_out_want(pair->out, length_of(16000), 5000) == 0) /* the consumer must ring, or this waits for ever */
            while (nsn_load_acquire(&stress->ring) == rings)
                sched_yield();
        nsn_link_out_unwant(pair->out);
    }
    return NULL;
}

struct kept { struct nsn_pool_ref ref; uint32_t number; };

/* Blocks are read in the producer's own mapping, late, and are to hold still what was sent in them. */
static void let_go(struct stress *stress, struct kept *kept)
{
    if (!kept->ref.use)
        return;
    const uint8_t *bytes = stress->read_blocks ? stress->blocks[kept->ref.ref] : NULL;
    for (uint32_t i = 0; stress->read_blocks && i < 5000; i += 7)
        if (bytes[i] != (kept->number / 64 & 0xff))
            CHECK_EQUAL(bytes[i], kept->number / 64 & 0xff);
    nsn_link_in_release(stress->pair.in, kept->ref.ref, kept->ref.use);
    kept->ref.use = 0;
}

static void consume_all(struct stress *stress)
{
    struct nsn_link_in *in = stress->pair.in;
    struct nsn_record_view view;
    struct kept kept[8] = {0};
    uint64_t seed = 6, rings = 0;
    uint32_t idle = 0;
    for (uint32_t number = 0; number < STRESS;) {
        int code = nsn_link_in_peek(in, &view, ANY);
        CHECK(code >= 0);
        if (code == 0) {
            if (nsn_link_in_publish(in) == 1)
                nsn_store_release(&stress->ring, ++rings);
            if (++idle % 8 == 0 && nsn_link_in_trim_begin(in)) {
                bool outside = nsn_load_acquire(&stress->publishing) == 0;
                stress->trims += nsn_link_in_trim_end(in, outside) > 0;
            }
            sched_yield();
            continue;
        }
        CHECK_EQUAL(view.sids[0], number);
        if (view.record.flags & NSN_RECORD_POOL) {
            struct kept *place = &kept[random_next(&seed) % 8];
            let_go(stress, place);
            *place = (struct kept){view.pool_ref, number};
        } else {
            CHECK_EQUAL(view.record.payload_length, mixed_size(number));
            for (uint32_t i = 0; i < view.record.payload_length; i++)
                if (view.payload[i] != (number & 0xff))
                    CHECK_EQUAL(view.payload[i], number & 0xff);
        }
        nsn_link_in_consume(in);
        number++;
        if (random_next(&seed) % 16 == 0 && nsn_link_in_publish(in) == 1)
            nsn_store_release(&stress->ring, ++rings);
        if (random_next(&seed) % 4096 == 0)
            for (int i = 0; i < 3; i++)
                sched_yield();
    }
}

static void run_stress(uint64_t limit, bool same_mapping)
{
    static struct stress stress;
    stress = (struct stress){.pair = open_pair(limit), .read_blocks = same_mapping || LESS == 1};
    char error[256] = "";
    if (same_mapping) { /* so that ThreadSanitizer sees both ends use one memory */
        nsn_link_in_destroy(stress.pair.in);
        CHECK_EQUAL(nsn_link_in_adopt(&stress.pair.in, nsn_link_out_file(stress.pair.out), 7, error, sizeof error), 0);
    }
    pthread_t producer;
    CHECK_EQUAL(pthread_create(&producer, NULL, produce, &stress), 0);
    consume_all(&stress);
    CHECK_EQUAL(pthread_join(producer, NULL), 0);
    CHECK(nsn_link_in_empty(stress.pair.in));
    printf("   %llu trims\n", (unsigned long long)stress.trims);
    close_pair(&stress.pair);
}

TEST(two_threads_with_a_small_limit_lose_nothing) { run_stress(40000, false); }
TEST(two_threads_with_a_large_limit_lose_nothing) { run_stress(0, false); }
TEST(two_threads_on_one_mapping_have_no_race) { run_stress(40000, true), run_stress(0, true); }

CHECK_MAIN()
