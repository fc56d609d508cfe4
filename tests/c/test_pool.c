/* Pools: classes and limits, counting, reuse, giving back, and what readers of a segment may do (read). */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "nsn_pool.h"

#define MIB (1ull << 20)
#define PLENTY (1ull << 32)
#define SECOND 1000000000ull

static struct nsn_block *take(struct nsn_pool *pool, uint64_t size, uint64_t allowance)
{
    struct nsn_block *block = NULL;
    CHECK_EQUAL(nsn_pool_take(pool, size, allowance, &block), 0);
    CHECK(block && block->capacity >= size);
    CHECK_EQUAL(block->holds, 1);
    CHECK_EQUAL((uintptr_t)block->data % 4096, 0);
    return block;
}

TEST(a_block_is_of_the_smallest_class_that_fits)
{
    struct nsn_pool *pool = nsn_pool_new();
    struct { uint64_t size, capacity; } cases[] = {
        {0, 12288}, {1, 12288}, {12288, 12288}, {12289, 20480}, {20480, 20480}, {20481, 36864},
        {MIB, MIB + 4096}, {MIB + 4096, MIB + 4096}, {MIB + 4097, 2 * MIB + 4096},
        {64 * MIB + 4096, 64 * MIB + 4096}, {64 * MIB + 4097, NSN_BLOCK_MAX}, {NSN_BLOCK_MAX, NSN_BLOCK_MAX},
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct nsn_block *block = take(pool, cases[i].size, PLENTY);
        CHECK_EQUAL(block->capacity, cases[i].capacity);
        block->data[0] = 1;
        block->data[block->capacity - 1] = 1;
        nsn_block_drop(pool, block, 0);
    }
    struct nsn_block *block;
    CHECK_EQUAL(nsn_pool_take(pool, NSN_BLOCK_MAX + 1, PLENTY, &block), -EMSGSIZE);
    nsn_pool_free(pool);
}

TEST(blocks_do_not_overlap)
{
    struct nsn_pool *pool = nsn_pool_new();
    enum { COUNT = 300 };
    struct nsn_block *blocks[COUNT];
    for (int i = 0; i < COUNT; i++) {
        blocks[i] = take(pool, 9000, PLENTY);
        memset(blocks[i]->data, i, blocks[i]->capacity);
    }
    for (int i = 0; i < COUNT; i++) {
        CHECK_EQUAL(blocks[i]->data[0], i & 0xff);
        CHECK_EQUAL(blocks[i]->data[blocks[i]->capacity - 1], i & 0xff);
        nsn_block_drop(pool, blocks[i], 0);
    }
    nsn_pool_free(pool);
}

TEST(a_block_is_used_again_when_everybody_dropped_it)
{
    struct nsn_pool *pool = nsn_pool_new();
    struct nsn_block *first = take(pool, 10000, PLENTY), *second = take(pool, 10000, PLENTY);
    nsn_block_hold(first);
    nsn_block_drop(pool, first, SECOND);
    CHECK(take(pool, 10000, PLENTY) != first); /* still held */
    nsn_block_drop(pool, second, 2 * SECOND);
    nsn_block_drop(pool, first, 3 * SECOND);
    CHECK(take(pool, 10000, PLENTY) == first); /* with time in between: the warmest */
    CHECK(take(pool, 10000, PLENTY) == second);
    nsn_pool_free(pool);
}

TEST(blocks_that_come_back_quickly_are_used_in_turn)
{
    struct nsn_pool *pool = nsn_pool_new();
    struct nsn_block *first = take(pool, 65536, PLENTY), *block = first;
    uint64_t turn = nsn_pool_bytes(pool) / first->capacity, steps = 0;
    CHECK(turn > 1);
    for (uint64_t now_ns = SECOND; now_ns < SECOND + 3 * turn; now_ns++) {
        nsn_block_drop(pool, block, now_ns);
        block = take(pool, 65536, PLENTY);
        steps += block == first;
    }
    CHECK(steps == 3 || steps == 4); /* the first to come back came before its turn */
    CHECK_EQUAL(nsn_pool_segments(pool), 1);
    nsn_pool_free(pool);
}

TEST(after_a_backlog_only_so_many_blocks_are_used_in_turn)
{
    struct nsn_pool *pool = nsn_pool_new();
    enum { COUNT = 500 };
    struct nsn_block *blocks[COUNT], *block;
    for (int i = 0; i < COUNT; i++)
        blocks[i] = take(pool, 65536, PLENTY);
    for (int i = 0; i < COUNT; i++)
        nsn_block_drop(pool, blocks[i], SECOND);
    for (int i = 0; i < COUNT; i++)
        blocks[i]->data[0] = 0;
    for (int i = 0; i < 4 * COUNT; i++) {
        block = take(pool, 65536, PLENTY);
        block->data[0] = 1;
        nsn_block_drop(pool, block, SECOND);
    }
    int used = 0;
    for (int i = 0; i < COUNT; i++)
        used += blocks[i]->data[0];
    CHECK(used > 16 && (uint64_t)used * block->capacity <= 4 * MIB);
    for (int i = 0; i < COUNT; i++) /* the others are there when they are needed */
        take(pool, 65536, nsn_pool_bytes(pool));
    nsn_pool_free(pool);
}

TEST(memory_stays_within_the_allowance)
{
    struct nsn_pool *pool = nsn_pool_new();
    uint64_t allowance = 10 * MIB, taken = 0;
    struct nsn_block *block;
    int code;
    while ((code = nsn_pool_take(pool, MIB, allowance, &block)) == 0)
        taken++;
    CHECK_EQUAL(code, -ENOBUFS);
    CHECK_EQUAL(taken, allowance / (MIB + 4096));
    CHECK(nsn_pool_bytes(pool) <= allowance);
    CHECK_EQUAL(nsn_pool_take(pool, 9000, 0, &block), -ENOBUFS);
    CHECK_EQUAL(nsn_pool_take(pool, 9000, nsn_pool_bytes(pool) + 12288, &block), 0); /* the last corner, too */
    CHECK_EQUAL(nsn_pool_take(pool, 9000, nsn_pool_bytes(pool) + 12287, &block), -ENOBUFS);
    nsn_pool_free(pool);
}

TEST(a_slow_steady_load_touches_few_blocks)
{
    struct nsn_pool *pool = nsn_pool_new();
    struct nsn_block *ring[4] = {0};
    for (int i = 0; i < 10000; i++) {
        if (ring[i % 4])
            nsn_block_drop(pool, ring[i % 4], (uint64_t)i * SECOND / 50);
        ring[i % 4] = take(pool, 65536, PLENTY);
        ring[i % 4]->data[0] = 1;
    }
    CHECK_EQUAL(nsn_pool_segments(pool), 1);
    uint32_t index;
    int fd;
    uint64_t size;
    CHECK_EQUAL(nsn_pool_segment(pool, ring[0]->segment, &index, &fd, &size), 0);
    struct stat status;
    CHECK_EQUAL(fstat(fd, &status), 0);
    CHECK(status.st_blocks * 512 <= 4 * 4096); /* a page of each of four blocks */
    CHECK_EQUAL(size, status.st_size);
    nsn_pool_free(pool);
}

TEST(segments_grow_with_demand)
{
    struct nsn_pool *pool = nsn_pool_new();
    for (uint64_t bytes = 0; bytes < 256 * MIB; bytes += 12288)
        take(pool, 9000, PLENTY);
    CHECK(nsn_pool_segments(pool) < 24);
    CHECK(nsn_pool_bytes(pool) < 256 * MIB + 17 * MIB);
    nsn_pool_free(pool);
}

TEST(segments_are_limited_in_number)
{
    struct nsn_pool *pool = nsn_pool_new();
    struct nsn_block *block;
    int code, count = 0;
    while ((code = nsn_pool_take(pool, 16 * MIB, 1ull << 40, &block)) == 0)
        count++;
    CHECK_EQUAL(code, -ENFILE);
    CHECK_EQUAL(count, NSN_POOL_SEGMENTS);
    nsn_pool_free(pool);
}

TEST(idle_segments_are_given_back_and_their_numbers_never_come_again)
{
    struct nsn_pool *pool = nsn_pool_new();
    struct nsn_segment_gone gone[8];
    uint32_t seen[40], seen_count = 0, index;
    int fd;
    uint64_t size, now_ns = SECOND;
    for (int round = 0; round < 10; round++) {
        struct nsn_block *blocks[3];
        for (int i = 0; i < 3; i++) { /* a segment each */
            blocks[i] = take(pool, 20 * MIB, PLENTY);
            for (uint32_t j = 0; j < seen_count; j++)
                CHECK(seen[j] != blocks[i]->segment);
        }
        for (int i = 0; i < 3; i++)
            seen[seen_count++] = blocks[i]->segment;
        nsn_block_drop(pool, blocks[0], now_ns);
        nsn_block_drop(pool, blocks[2], now_ns);
        CHECK_EQUAL(nsn_pool_trim(pool, now_ns + NSN_SEGMENT_IDLE_NS - 1, gone, 8), 0);
        CHECK_EQUAL(nsn_pool_trim(pool, now_ns + NSN_SEGMENT_IDLE_NS, gone, 1), 1);
        CHECK_EQUAL(nsn_pool_trim(pool, now_ns + NSN_SEGMENT_IDLE_NS, gone + 1, 7), 1); /* the held one is not */
        CHECK(gone[0].index < NSN_POOL_SEGMENTS && gone[0].index != gone[1].index);
        CHECK_EQUAL(nsn_pool_segment(pool, gone[0].segment, &index, &fd, &size), -ENOENT);
        CHECK_EQUAL(nsn_pool_segment(pool, blocks[1]->segment, &index, &fd, &size), 0);
        CHECK(index != gone[0].index && index != gone[1].index);
        nsn_block_drop(pool, blocks[1], now_ns);
        CHECK_EQUAL(nsn_pool_trim(pool, now_ns + 9 * NSN_SEGMENT_IDLE_NS, gone, 8), 0); /* the last of its class stays longer */
        now_ns += 10 * NSN_SEGMENT_IDLE_NS;
        CHECK_EQUAL(nsn_pool_trim(pool, now_ns, gone, 8), 1);
        CHECK_EQUAL(nsn_pool_bytes(pool), 0);
        CHECK_EQUAL(nsn_pool_segments(pool), 0);
    }
    nsn_pool_free(pool);
}

TEST(blocks_of_a_segment_given_back_are_not_taken_again)
{
    struct nsn_pool *pool = nsn_pool_new();
    struct nsn_segment_gone gone[8];
    enum { COUNT = 400 };
    struct nsn_block *blocks[COUNT];
    for (int i = 0; i < COUNT; i++)
        blocks[i] = take(pool, 9000, PLENTY);
    uint32_t kept = blocks[COUNT / 2]->segment;
    for (int i = 0; i < COUNT; i++)
        if (blocks[i]->segment != kept || i % 2)
            nsn_block_drop(pool, blocks[i], 0);
    CHECK(nsn_pool_trim(pool, 2 * SECOND, gone, 8) > 0);
    CHECK_EQUAL(nsn_pool_segments(pool), 1);
    for (int i = 0; i < COUNT; i++) {
        struct nsn_block *block = take(pool, 9000, PLENTY);
        memset(block->data, 1, block->capacity);
    }
    nsn_pool_free(pool);
}

TEST(readers_can_read_and_nobody_else_can_write)
{
    struct nsn_pool *pool = nsn_pool_new();
    struct nsn_block *block = take(pool, 10000, PLENTY);
    uint32_t index;
    int fd;
    uint64_t size;
    char error[256] = "";
    CHECK_EQUAL(nsn_pool_segment(pool, block->segment, &index, &fd, &size), 0);
    CHECK(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED);
    CHECK(pwrite(fd, "x", 1, 0) < 0);
    CHECK(ftruncate(fd, 0) < 0);
    CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) < 0);
    struct nsn_segment_in *reader;
    CHECK_EQUAL(nsn_segment_in_map(&reader, fd, block->segment, size, error, sizeof error), 0);
    strcpy((char *)block->data, "written later");
    CHECK_EQUAL(strcmp((const char *)reader->data + block->offset, "written later"), 0);
    nsn_segment_in_hold(reader);
    nsn_pool_free(pool);
    nsn_segment_in_drop(reader);
    CHECK_EQUAL(strcmp((const char *)reader->data, "written later"), 0); /* the producer is gone, the buffer is not */
    nsn_segment_in_drop(reader);
}

TEST(a_forked_child_has_neither_memory_nor_harm_from_abandoning_it)
{
    struct nsn_pool *pool = nsn_pool_new();
    struct nsn_block *block = take(pool, MIB, PLENTY);
    uint32_t index;
    int fd, status;
    uint64_t size;
    CHECK_EQUAL(nsn_pool_segment(pool, block->segment, &index, &fd, &size), 0);
    pid_t child = fork();
    if (child == 0) {
        unsigned char resident;
        bool there = mincore(block->data, 4096, &resident) == 0;
        nsn_pool_abandon(pool);
        _exit(there || fcntl(fd, F_GETFD) != -1);
    }
    CHECK_EQUAL(waitpid(child, &status, 0), child);
    CHECK_EQUAL(status, 0);
    block->data[0] = 1;
    nsn_pool_free(pool);
}

static int map_fake(int seals, uint64_t true_size, uint64_t said_size)
{
    struct nsn_segment_in *reader;
    char error[256] = "";
    int fd = memfd_create("fake", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK_EQUAL(ftruncate(fd, (off_t)true_size), 0);
    CHECK_EQUAL(fcntl(fd, F_ADD_SEALS, seals), 0);
    int code = nsn_segment_in_map(&reader, fd, 1, said_size, error, sizeof error);
    if (code == 0)
        nsn_segment_in_drop(reader);
    else
        CHECK(error[0]);
    close(fd);
    return code;
}

TEST(only_a_sealed_segment_of_the_size_it_is_said_to_have_is_mapped)
{
    CHECK_EQUAL(map_fake(F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE, 8192, 8192), 0);
    CHECK_EQUAL(map_fake(F_SEAL_FUTURE_WRITE, 8192, 8192), -EPROTO);
    CHECK_EQUAL(map_fake(F_SEAL_SHRINK, 8192, 8192), -EPROTO);
    CHECK_EQUAL(map_fake(F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE, 8192, 16384), -EPROTO);
    CHECK_EQUAL(map_fake(F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE, 0, 0), -EPROTO);
    CHECK_EQUAL(map_fake(F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE, 1ull << 40, 1ull << 40), -EPROTO);
    int ends[2];
    struct nsn_segment_in *reader;
    char error[256] = "";
    CHECK_EQUAL(pipe(ends), 0);
    CHECK_EQUAL(nsn_segment_in_map(&reader, ends[0], 1, 4096, error, sizeof error), -EPROTO);
    close(ends[0]);
    close(ends[1]);
}

static uint64_t random_next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

TEST(random_use_keeps_every_block_whole)
{
    enum { COUNT = 200 };
    struct nsn_pool *pool = nsn_pool_new();
    struct nsn_block *held[COUNT] = {0};
    struct nsn_segment_gone gone[4];
    uint64_t seed = 42, now_ns = 0;
    for (int step = 0; step < 30000; step++) {
        unsigned i = (unsigned)(random_next(&seed) % COUNT);
        uint64_t mark;
        now_ns += random_next(&seed) % (SECOND / 50);
        if (!held[i]) {
            int code = nsn_pool_take(pool, random_next(&seed) % (1u << (10 + random_next(&seed) % 12)), 64 * MIB, &held[i]);
            CHECK(code == 0 || code == -ENOBUFS);
            if (code == 0) {
                memcpy(held[i]->data + held[i]->capacity - 8, &(uint64_t){i}, 8);
                for (uint64_t more = random_next(&seed) % 3; more; more--)
                    nsn_block_hold(held[i]);
            }
        } else {
            memcpy(&mark, held[i]->data + held[i]->capacity - 8, 8);
            CHECK_EQUAL(mark, i);
            bool last = held[i]->holds == 1;
            nsn_block_drop(pool, held[i], now_ns);
            if (last)
                held[i] = NULL;
        }
        if (step % 64 == 0)
            nsn_pool_trim(pool, now_ns, gone, 4);
        CHECK(nsn_pool_bytes(pool) <= 64 * MIB);
    }
    nsn_pool_free(pool);
}

TEST(blocks_of_before_a_retirement_are_never_taken_again)
{
    struct nsn_pool *pool = nsn_pool_new();
    struct nsn_block *kept, *dropped, *block;
    uint32_t index;
    uint64_t size;
    int fd;
    CHECK_EQUAL(nsn_pool_take(pool, 10000, UINT64_MAX, &kept), 0);
    CHECK_EQUAL(nsn_pool_take(pool, 10000, UINT64_MAX, &dropped), 0);
    uint32_t segment = kept->segment;
    CHECK_EQUAL(dropped->segment, segment);
    nsn_block_drop(pool, dropped, 0);
    nsn_pool_retire(pool);
    CHECK_EQUAL(nsn_pool_take(pool, 10000, UINT64_MAX, &block), 0);
    CHECK(block->segment != segment);
    kept->data[0] = 1; /* it is still the holder's, who may also publish it */
    CHECK_EQUAL(nsn_pool_segment(pool, segment, &index, &fd, &size), 0);
    nsn_block_drop(pool, kept, 0);
    CHECK_EQUAL(nsn_pool_segment(pool, segment, &index, &fd, &size), -ENOENT);
    CHECK_EQUAL(nsn_pool_segments(pool), 1);
    nsn_block_drop(pool, block, 0);
    nsn_pool_retire(pool);
    CHECK_EQUAL(nsn_pool_bytes(pool), 0);
    CHECK_EQUAL(nsn_pool_held(pool), 0);
    nsn_pool_free(pool);
}

CHECK_MAIN()
