/* The bounded cache of resolved subjects in front of the tree of tokens. Private to nsn_route.c. */
#ifndef NSN_ROUTE_CACHE_H
#define NSN_ROUTE_CACHE_H

#include <stdbool.h>

#include "nsn_route.h"
#include "nsn_table.h"

#define NSN_CACHE_SUBJECT_INLINE 80 /* an inbox's subject and most others; a longer one is memory of its own */

struct nsn_cached {
    const struct nsn_route *route; /* NULL: this entry is free */
    const char *subject;
    uint32_t length;
    uint32_t referenced; /* found since the eviction hand last passed */
    void *owned;         /* the route's memory, when it is of this subject alone */
    size_t owned_size;
    uint64_t hash;
    char inline_subject[NSN_CACHE_SUBJECT_INLINE];
};

struct nsn_cache_place { /* of the index: open addressing, linear probing */
    uint32_t tag;        /* high half of the subject's hash; its low bits are the home position */
    uint32_t entry;      /* number + 1; 0: empty */
};

struct nsn_cache {
    struct nsn_cache_place *index;
    struct nsn_cached *entries;
    uint64_t *beginnings; /* first eight bytes of each cached subject, side by side for the search by pattern */
    uint32_t *free;       /* stack of free entries below `used` */
    uint16_t *seen;       /* marks of subjects looked up once while the cache was full; the second time admits them */
    uint32_t index_mask, capacity, used, free_count, hand;
    size_t owned, owned_most; /* bytes of long subjects and owned routes */
    size_t bytes;             /* of all memory */
};

bool nsn_cache_init(struct nsn_cache *cache, size_t entries);
void nsn_cache_free(struct nsn_cache *cache);
void nsn_cache_clear(struct nsn_cache *cache);

/* Drops what a valid pattern matches. seed: of the subjects' hashes. */
void nsn_cache_drop(struct nsn_cache *cache, const char *pattern, size_t length, uint64_t seed);

/* Whether a subject that was not found is worth an entry, with `owned` bytes of route; makes room for it if so. */
bool nsn_cache_admit(struct nsn_cache *cache, size_t length, uint64_t hash, size_t owned);

/* After admission. owned: the route's memory, counted in cache->bytes and the entry's from now on, or NULL. False when there
 * is no memory: then it stays the caller's. */
bool nsn_cache_put(struct nsn_cache *cache, const char *subject, size_t length, uint64_t hash, const struct nsn_route *route,
                   void *owned, size_t owned_size);

static inline size_t nsn_cache_count(const struct nsn_cache *cache) { return cache->used - cache->free_count; }

static inline uint32_t nsn_cache_tag(uint64_t hash) { return (uint32_t)(hash >> 32); }

static inline struct nsn_cached *nsn_cache_find(const struct nsn_cache *cache, const char *subject, size_t length,
                                                uint64_t hash)
{
    uint32_t tag = nsn_cache_tag(hash);
    for (uint32_t at = tag & cache->index_mask; cache->index[at].entry; at = (at + 1) & cache->index_mask) {
        if (cache->index[at].tag != tag)
            continue;
        struct nsn_cached *cached = &cache->entries[cache->index[at].entry - 1];
        if (cached->length == length && nsn_same_bytes(cached->subject, subject, length))
            return cached;
    }
    return NULL;
}

#endif
