/* A session's pool: blocks of memory for large payloads and for every buffer that a program takes with get_buffer.
 *
 * Several memfd segments, each cut into blocks of one size class, mapped writable by the owner before they are sealed
 * (SHRINK, GROW, FUTURE_WRITE, SEAL), so that nobody else can ever write. Readers map a segment read-only. A block is counted:
 * it is used again when everybody who holds it has dropped it: quickly one after the other, a few MiB of them in turn, else
 * the warmest. A segment that has been wholly free for a while is given back whole.
 */
#ifndef NSN_POOL_H
#define NSN_POOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NSN_POOL_SEGMENTS 256u             /* alive at once */
#define NSN_BLOCK_MAX (72ull << 20)        /* largest block: 64 MiB of payload and its headers */
#define NSN_SEGMENT_IDLE_NS 1000000000ull  /* a free segment is given back after this, the last of a class after 10 × this */

struct nsn_block {
    uint8_t *data;                         /* the owner's writable mapping */
    uint64_t capacity;                     /* bytes */
    uint64_t offset;                       /* in the segment */
    uint32_t segment;                      /* the segment's number in the session's life, never used twice */
    uint32_t holds;                        /* how often it is held; 0: free */
    struct nsn_block *next;                /* private to the pool */
    void *owner;                           /* private to the pool */
};

struct nsn_pool;
struct nsn_pool *nsn_pool_new(void);
/* Unmaps everything and closes descriptors. Readers' mappings stay good. */
void nsn_pool_free(struct nsn_pool *pool);
/* The same in a forked child, which has the descriptors but not the mappings: other memory may lie in their place by now. (A
 * link holds no descriptor; in a child it is left alone.) */
void nsn_pool_abandon(struct nsn_pool *pool);

/* No block that there is now is taken again: readers that nobody hears of any more may still borrow it. Those that are held
 * stay good until they are dropped. */
void nsn_pool_retire(struct nsn_pool *pool);

/* A block of at least `size` bytes, held once. A new segment is made when no block is free and the bytes touched would stay
 * within `allowance`; else -ENOBUFS. -EMSGSIZE above NSN_BLOCK_MAX, -ENFILE at NSN_POOL_SEGMENTS, else the kernel's errno. */
int nsn_pool_take(struct nsn_pool *pool, uint64_t size, uint64_t allowance, struct nsn_block **block);
void nsn_block_hold(struct nsn_block *block);
void nsn_block_drop(struct nsn_pool *pool, struct nsn_block *block, uint64_t now_ns);

uint64_t nsn_pool_bytes(const struct nsn_pool *pool);      /* size of all segments */
uint64_t nsn_pool_held(const struct nsn_pool *pool);       /* of the blocks that somebody holds */
size_t nsn_pool_segments(const struct nsn_pool *pool);
/* A segment's descriptor (the pool's own) and size, for handing over; -ENOENT. index: dense place (< NSN_POOL_SEGMENTS)
 * of a living segment, for the caller's bitmaps; it is used again after the segment is gone. */
int nsn_pool_segment(const struct nsn_pool *pool, uint32_t segment, uint32_t *index, int *fd, uint64_t *size);
/* Gives back segments that have been free for long; at most `most`, their numbers and places in gone[]. Returns how many. */
struct nsn_segment_gone { uint32_t segment; uint32_t index; };
size_t nsn_pool_trim(struct nsn_pool *pool, uint64_t now_ns, struct nsn_segment_gone *gone, size_t most);

/* --- a reader's side ----------------------------------------------------------------------------------------------- */
struct nsn_segment_in {
    const uint8_t *data;
    uint64_t size;
    uint32_t segment;
    uint32_t holds;                        /* the table's one, and one for each borrowed block */
};
/* Maps read-only after checking seals and size; the descriptor stays the caller's. Held once. */
int nsn_segment_in_map(struct nsn_segment_in **segment, int fd, uint32_t number, uint64_t size, char *error, size_t error_size);
void nsn_segment_in_hold(struct nsn_segment_in *segment);
void nsn_segment_in_drop(struct nsn_segment_in *segment);  /* unmaps at the last one */

#endif
