/* A session's pool: size classes, segments cut into blocks of one class, and a list of free blocks for each class. */
#include "nsn_pool.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nsn_memfd.h"

#define SMALLEST 13u               /* the classes' blocks have 2^13 … 2^26 bytes, and a page more for headers … */
#define CLASSES 15u                /* … and the last one NSN_BLOCK_MAX */
#define CLASS_EXTRA 4096u
#define SEGMENT_MIN (1ull << 20)   /* bytes of a class's first segment, or one block */
#define SEGMENT_MAX (16ull << 20)  /* and of its largest, or one block */
#define TURN_BYTES (4ull << 20)    /* of free blocks of a class that are used in turn … */
#define TURN_NS 10000000ull        /* … if they come back one after the other within this: else one is enough */
#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)
#define READER_NEEDS (F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE)

_Static_assert((NSN_POOL_SEGMENTS & (NSN_POOL_SEGMENTS - 1)) == 0, "a segment's place is the low bits of its number");

struct segment {
    uint32_t number, class;
    int fd;
    uint8_t *data;
    uint64_t size;
    uint64_t free_since_ns;        /* when the last held block came back */
    uint32_t count, free_count;    /* blocks */
    bool retired;                  /* no block of it is taken again */
    struct nsn_block blocks[];
};

/* Free blocks. A block that has just come back lies in the cache of the processor that has read it, and to write it takes as
 * long as if it lay in no cache at all. So blocks are used in turn, as many as stay in the cache that processors share; what
 * is free beyond these, after a backlog, rests. */
struct class {
    struct nsn_block *turn, **turn_end; /* used next, the one that came back first in front */
    uint64_t turn_bytes;
    struct nsn_block *resting;     /* taken when no other is free */
    uint64_t dropped_ns;           /* when a block came back last */
    uint64_t bytes;                /* of its segments */
    uint32_t segments;
};

struct nsn_pool {
    struct class classes[CLASSES];
    struct segment *segments[NSN_POOL_SEGMENTS];
    uint32_t lives[NSN_POOL_SEGMENTS]; /* how many segments there have been in each place */
    size_t segment_count;
    uint64_t bytes, held;          /* of all segments; of the blocks that are not free */
};

static uint64_t block_bytes(uint32_t class)
{
    return class == CLASSES - 1 ? NSN_BLOCK_MAX : (1ull << (SMALLEST + class)) + CLASS_EXTRA;
}

static uint32_t class_of(uint64_t size)
{
    if (size <= block_bytes(0))
        return 0;
    uint32_t class = 64u - (uint32_t)__builtin_clzll(size - CLASS_EXTRA - 1) - SMALLEST;
    return class < CLASSES - 1 ? class : CLASSES - 1;
}

/* --- free blocks ---------------------------------------------------------------------------------------------------- */

static struct nsn_block *take_turn(struct class *class)
{
    struct nsn_block *block = class->turn;
    class->turn = block->next;
    if (!class->turn)
        class->turn_end = &class->turn;
    class->turn_bytes -= block->capacity;
    return block;
}

static void rest(struct class *class, struct nsn_block *block)
{
    block->next = class->resting;
    class->resting = block;
}

static void put_in_front(struct class *class, struct nsn_block *block)
{
    block->next = class->turn;
    class->turn = block;
    if (!block->next)
        class->turn_end = &block->next;
    class->turn_bytes += block->capacity;
}

static void put_behind(struct class *class, struct nsn_block *block)
{
    block->next = NULL;
    *class->turn_end = block;
    class->turn_end = &block->next;
    class->turn_bytes += block->capacity;
    while (class->turn_bytes > TURN_BYTES && class->turn != block)
        rest(class, take_turn(class));
}

static void clear_turn(struct class *class)
{
    class->turn = NULL;
    class->turn_end = &class->turn;
    class->turn_bytes = 0;
}

static void forget_blocks(struct class *class, const struct segment *segment)
{
    struct nsn_block **link = &class->resting;
    while (*link) {
        if ((*link)->owner == segment)
            *link = (*link)->next;
        else
            link = &(*link)->next;
    }
    struct nsn_block *block = class->turn, *next;
    clear_turn(class);
    for (; block; block = next) {
        next = block->next;
        if (block->owner != segment)
            put_behind(class, block);
    }
}

/* --- segments ------------------------------------------------------------------------------------------------------- */

struct nsn_pool *nsn_pool_new(void)
{
    struct nsn_pool *pool = calloc(1, sizeof *pool);
    for (uint32_t class = 0; pool && class < CLASSES; class++)
        clear_turn(&pool->classes[class]);
    return pool;
}

static void free_segment(struct nsn_pool *pool, uint32_t index)
{
    struct segment *segment = pool->segments[index];
    struct class *class = &pool->classes[segment->class];
    munmap(segment->data, segment->size);
    close(segment->fd);
    class->bytes -= segment->size;
    class->segments--;
    pool->bytes -= segment->size;
    pool->segment_count--;
    pool->segments[index] = NULL;
    free(segment);
}

void nsn_pool_free(struct nsn_pool *pool)
{
    if (!pool)
        return;
    for (uint32_t index = 0; index < NSN_POOL_SEGMENTS; index++)
        if (pool->segments[index])
            free_segment(pool, index);
    free(pool);
}

void nsn_pool_abandon(struct nsn_pool *pool)
{
    if (!pool)
        return;
    for (uint32_t index = 0; index < NSN_POOL_SEGMENTS; index++) {
        if (!pool->segments[index])
            continue;
        close(pool->segments[index]->fd);
        free(pool->segments[index]);
    }
    free(pool);
}

/* A segment's blocks double with the demand for its class, within SEGMENT_MAX and what the allowance leaves. */
static uint32_t blocks_for(const struct nsn_pool *pool, uint32_t class, uint64_t allowance)
{
    uint64_t block = block_bytes(class), wanted = pool->classes[class].bytes;
    uint64_t left = allowance > pool->bytes ? allowance - pool->bytes : 0;
    wanted = wanted < SEGMENT_MIN ? SEGMENT_MIN : wanted > SEGMENT_MAX ? SEGMENT_MAX : wanted;
    wanted = wanted < block ? block : wanted;
    return (uint32_t)((wanted < left ? wanted : left) / block);
}

/* Maps memory for a segment while it may still be written, then seals it. */
static int back_segment(struct segment *segment)
{
    char unused[1]; /* the caller has a number to report, and the words for it */
    int code = nsn_memfd_create("nsn-pool", segment->size, unused, sizeof unused);
    if (code < 0)
        return code;
    segment->fd = code;
    segment->data = nsn_memfd_map(segment->fd, segment->size, PROT_READ | PROT_WRITE, unused, sizeof unused);
    code = segment->data ? nsn_memfd_seal(segment->fd, SEALS, unused, sizeof unused) : -errno;
    if (code == 0)
        return 0;
    if (segment->data)
        munmap(segment->data, segment->size);
    close(segment->fd);
    return code;
}

static int add_segment(struct nsn_pool *pool, uint32_t class, uint64_t allowance)
{
    uint32_t index = 0, count = blocks_for(pool, class, allowance);
    if (count == 0)
        return -ENOBUFS;
    while (index < NSN_POOL_SEGMENTS && pool->segments[index])
        index++;
    if (index == NSN_POOL_SEGMENTS)
        return -ENFILE;
    struct segment *segment = calloc(1, sizeof *segment + count * sizeof segment->blocks[0]);
    if (!segment)
        return -ENOMEM;
    segment->size = count * block_bytes(class);
    int code = back_segment(segment);
    if (code < 0) {
        free(segment);
        return code;
    }
    segment->class = class;
    segment->number = ++pool->lives[index] * NSN_POOL_SEGMENTS + index; /* finds the place, and is never used twice */
    segment->count = segment->free_count = count;
    for (uint32_t i = count; i-- > 0;) {
        struct nsn_block *block = &segment->blocks[i];
        block->capacity = block_bytes(class);
        block->offset = i * block_bytes(class);
        block->data = segment->data + block->offset;
        block->segment = segment->number;
        block->owner = segment;
        put_in_front(&pool->classes[class], block);
    }
    pool->classes[class].bytes += segment->size;
    pool->classes[class].segments++;
    pool->bytes += segment->size;
    pool->segment_count++;
    pool->segments[index] = segment;
    return 0;
}

int nsn_pool_take(struct nsn_pool *pool, uint64_t size, uint64_t allowance, struct nsn_block **result)
{
    if (size > NSN_BLOCK_MAX)
        return -EMSGSIZE;
    struct class *class = &pool->classes[class_of(size)];
    if (!class->turn && !class->resting) {
        int code = add_segment(pool, class_of(size), allowance);
        if (code < 0)
            return code;
    }
    struct nsn_block *block = class->resting;
    if (class->turn)
        block = take_turn(class);
    else
        class->resting = block->next;
    block->next = NULL;
    block->holds = 1;
    ((struct segment *)block->owner)->free_count--;
    pool->held += block->capacity;
    *result = block;
    return 0;
}

void nsn_block_hold(struct nsn_block *block)
{
    assert(block->holds > 0 && block->holds < UINT32_MAX);
    block->holds++;
}

void nsn_block_drop(struct nsn_pool *pool, struct nsn_block *block, uint64_t now_ns)
{
    assert(block->holds > 0);
    if (--block->holds)
        return;
    pool->held -= block->capacity;
    struct segment *segment = block->owner;
    segment->free_count++;
    if (segment->retired) {
        if (segment->free_count == segment->count)
            free_segment(pool, segment->number % NSN_POOL_SEGMENTS);
        return;
    }
    struct class *class = &pool->classes[segment->class];
    if (now_ns > class->dropped_ns + TURN_NS)
        put_in_front(class, block);
    else
        put_behind(class, block);
    class->dropped_ns = now_ns;
    if (segment->free_count == segment->count)
        segment->free_since_ns = now_ns;
}

uint64_t nsn_pool_bytes(const struct nsn_pool *pool) { return pool->bytes; }
uint64_t nsn_pool_held(const struct nsn_pool *pool) { return pool->held; }
size_t nsn_pool_segments(const struct nsn_pool *pool) { return pool->segment_count; }

int nsn_pool_segment(const struct nsn_pool *pool, uint32_t number, uint32_t *index, int *fd, uint64_t *size)
{
    const struct segment *segment = pool->segments[number % NSN_POOL_SEGMENTS];
    if (!segment || segment->number != number)
        return -ENOENT;
    *index = number % NSN_POOL_SEGMENTS;
    *fd = segment->fd;
    *size = segment->size;
    return 0;
}

static bool is_idle(const struct nsn_pool *pool, const struct segment *segment, uint64_t now_ns)
{
    uint64_t patience_ns = pool->classes[segment->class].segments == 1 ? 10 * NSN_SEGMENT_IDLE_NS : NSN_SEGMENT_IDLE_NS;
    return !segment->retired && segment->free_count == segment->count && now_ns >= segment->free_since_ns + patience_ns;
}

void nsn_pool_retire(struct nsn_pool *pool)
{
    for (uint32_t class = 0; class < CLASSES; class++)
        clear_turn(&pool->classes[class]), pool->classes[class].resting = NULL;
    for (uint32_t index = 0; index < NSN_POOL_SEGMENTS; index++) {
        struct segment *segment = pool->segments[index];
        if (!segment)
            continue;
        segment->retired = true;
        if (segment->free_count == segment->count)
            free_segment(pool, index);
    }
}

size_t nsn_pool_trim(struct nsn_pool *pool, uint64_t now_ns, struct nsn_segment_gone *gone, size_t most)
{
    size_t count = 0;
    for (uint32_t index = 0; index < NSN_POOL_SEGMENTS && count < most; index++) {
        struct segment *segment = pool->segments[index];
        if (!segment || !is_idle(pool, segment, now_ns))
            continue;
        gone[count++] = (struct nsn_segment_gone){segment->number, index};
        forget_blocks(&pool->classes[segment->class], segment);
        free_segment(pool, index);
    }
    return count;
}

/* --- a reader's side ----------------------------------------------------------------------------------------------- */

int nsn_segment_in_map(struct nsn_segment_in **result, int fd, uint32_t number, uint64_t size, char *error, size_t error_size)
{
    if (size == 0 || size > NSN_BLOCK_MAX) { /* the largest segment is one block of the largest class */
        snprintf(error, error_size, "pool segment %u is said to have %llu bytes; 1 to %llu are possible", number,
                 (unsigned long long)size, (unsigned long long)NSN_BLOCK_MAX);
        return -EPROTO;
    }
    int code = nsn_memfd_check(fd, "the pool segment", size, READER_NEEDS, 0, error, error_size);
    if (code < 0)
        return code;
    struct nsn_segment_in *segment = calloc(1, sizeof *segment);
    if (!segment) {
        snprintf(error, error_size, "out of memory for pool segment %u", number);
        return -ENOMEM;
    }
    segment->data = nsn_memfd_map(fd, size, PROT_READ, error, error_size);
    if (!segment->data) {
        free(segment);
        return -errno;
    }
    segment->size = size;
    segment->segment = number;
    segment->holds = 1;
    *result = segment;
    return 0;
}

void nsn_segment_in_hold(struct nsn_segment_in *segment)
{
    assert(segment->holds > 0 && segment->holds < UINT32_MAX);
    segment->holds++;
}

void nsn_segment_in_drop(struct nsn_segment_in *segment)
{
    assert(segment->holds > 0);
    if (--segment->holds)
        return;
    munmap((void *)(uintptr_t)segment->data, segment->size);
    free(segment);
}
