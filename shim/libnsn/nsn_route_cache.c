/* Resolved subjects: found by hash, evicted by a clock's hand, dropped by the pattern that changed. */
#include "nsn_route_cache.h"

#include "nsn_counted.h"
#include "nsn_subject.h"

#define BYTES_PER_ENTRY 1024 /* bound of what entries own, on average */
#define ENTRIES_MOST (1u << 24)
#define SEARCHED 8 /* beginnings of subjects compared at once */

bool nsn_cache_init(struct nsn_cache *cache, size_t entries)
{
    uint32_t places = 8;
    if (entries > ENTRIES_MOST)
        return false;
    while (places < entries * 2)
        places *= 2;
    cache->capacity = (uint32_t)entries;
    cache->index_mask = places - 1;
    cache->owned_most = entries * BYTES_PER_ENTRY;
    cache->index = nsn_take(&cache->bytes, places * sizeof(*cache->index));
    cache->entries = nsn_take(&cache->bytes, entries * sizeof(*cache->entries));
    cache->beginnings = nsn_take(&cache->bytes, (entries + SEARCHED) * sizeof(*cache->beginnings));
    cache->free = nsn_take(&cache->bytes, entries * sizeof(*cache->free));
    cache->seen = nsn_take(&cache->bytes, places * sizeof(*cache->seen));
    return cache->index && cache->entries && cache->beginnings && cache->free && cache->seen;
}

void nsn_cache_free(struct nsn_cache *cache)
{
    if (cache->index)
        nsn_cache_clear(cache);
    free(cache->index);
    free(cache->entries);
    free(cache->beginnings);
    free(cache->free);
    free(cache->seen);
}

static void index_remove(struct nsn_cache *cache, uint32_t number, uint64_t hash)
{
    uint32_t mask = cache->index_mask, hole = nsn_cache_tag(hash) & mask;
    while (cache->index[hole].entry != number + 1)
        hole = (hole + 1) & mask;
    for (uint32_t at = (hole + 1) & mask; cache->index[at].entry; at = (at + 1) & mask) {
        uint32_t home = cache->index[at].tag & mask;
        if (((at - home) & mask) < ((at - hole) & mask)) /* would stand in front of its home */
            continue;
        cache->index[hole] = cache->index[at];
        hole = at;
    }
    cache->index[hole].entry = 0;
}

static void empty(struct nsn_cache *cache, struct nsn_cached *cached)
{
    if (cached->subject != cached->inline_subject) {
        cache->owned -= cached->length;
        nsn_give(&cache->bytes, (char *)cached->subject, cached->length);
    }
    cache->owned -= cached->owned_size;
    nsn_give(&cache->bytes, cached->owned, cached->owned_size);
    cached->owned = NULL;
    cached->owned_size = 0;
    cached->route = NULL;
}

static void drop(struct nsn_cache *cache, uint32_t number)
{
    struct nsn_cached *cached = &cache->entries[number];
    index_remove(cache, number, cached->hash);
    empty(cache, cached);
    cache->beginnings[number] = 0;
    cache->free[cache->free_count++] = number;
}

void nsn_cache_clear(struct nsn_cache *cache)
{
    for (uint32_t i = 0; i < cache->used; i++)
        if (cache->entries[i].route)
            empty(cache, &cache->entries[i]);
    memset(cache->index, 0, ((size_t)cache->index_mask + 1) * sizeof(*cache->index));
    cache->used = cache->free_count = cache->hand = 0;
}

static void evict(struct nsn_cache *cache)
{
    for (;;) {
        uint32_t number = cache->hand;
        cache->hand = number + 1 == cache->used ? 0 : number + 1;
        struct nsn_cached *cached = &cache->entries[number];
        if (cached->route && !cached->referenced) {
            drop(cache, number);
            return;
        }
        cached->referenced = 0;
    }
}

/* A subject that comes by once, among more subjects than the cache holds, would only cost an eviction. */
static bool worth_an_entry(struct nsn_cache *cache, uint64_t hash)
{
    if (nsn_cache_count(cache) < cache->capacity)
        return true;
    uint16_t *seen = &cache->seen[hash & cache->index_mask], mark = (uint16_t)(nsn_cache_tag(hash) >> 16) | 1;
    if (*seen == mark)
        return true;
    *seen = mark;
    return false;
}

bool nsn_cache_admit(struct nsn_cache *cache, size_t length, uint64_t hash, size_t owned)
{
    owned += length > NSN_CACHE_SUBJECT_INLINE ? length : 0;
    if (owned > cache->owned_most / 4 || !worth_an_entry(cache, hash))
        return false;
    for (size_t count; (count = nsn_cache_count(cache));) {
        if (count < cache->capacity && cache->owned + owned <= cache->owned_most)
            break;
        evict(cache);
    }
    return true;
}

static uint64_t beginning_of(const char *bytes, size_t length)
{
    uint64_t word = 0;
    memcpy(&word, bytes, length < 8 ? length : 8);
    return word;
}

static void index_insert(struct nsn_cache *cache, uint32_t number, uint64_t hash)
{
    uint32_t at = nsn_cache_tag(hash) & cache->index_mask;
    while (cache->index[at].entry)
        at = (at + 1) & cache->index_mask;
    cache->index[at] = (struct nsn_cache_place){nsn_cache_tag(hash), number + 1};
}

bool nsn_cache_put(struct nsn_cache *cache, const char *subject, size_t length, uint64_t hash, const struct nsn_route *route,
                   void *owned, size_t owned_size)
{
    uint32_t number = cache->free_count ? cache->free[cache->free_count - 1] : cache->used;
    struct nsn_cached *cached = &cache->entries[number];
    char *copy = cached->inline_subject;
    if (length > NSN_CACHE_SUBJECT_INLINE) {
        copy = nsn_take(&cache->bytes, length);
        if (!copy)
            return false;
        cache->owned += length;
    }
    memcpy(copy, subject, length);
    cached->route = route;
    cached->subject = copy;
    cached->length = (uint32_t)length;
    cached->hash = hash;
    cached->referenced = 0;
    cached->owned = owned;
    cached->owned_size = owned_size;
    cache->owned += owned_size;
    cache->beginnings[number] = beginning_of(subject, length);
    if (cache->free_count)
        cache->free_count--;
    else
        cache->used++;
    index_insert(cache, number, hash);
    return true;
}

/* Whether any of SEARCHED subjects begins so; a loop of fixed length that compiles to a few vector instructions. */
static inline bool any_begins(const uint64_t *beginnings, uint64_t beginning, uint64_t mask)
{
    uint64_t found = 0;
    for (int i = 0; i < SEARCHED; i++)
        found |= ((beginnings[i] ^ beginning) & mask) == 0;
    return found;
}

static void drop_wildcard(struct nsn_cache *cache, const char *pattern, size_t length, size_t prefix)
{
    size_t compared = prefix < 8 ? prefix : 8;
    uint64_t mask = 0, beginning = beginning_of(pattern, compared);
    memset(&mask, 0xff, compared);
    for (uint32_t start = 0; start < cache->used; start += SEARCHED) {
        if (!any_begins(cache->beginnings + start, beginning, mask))
            continue;
        for (uint32_t i = start; i < start + SEARCHED && i < cache->used; i++) {
            struct nsn_cached *cached = &cache->entries[i];
            if (((cache->beginnings[i] ^ beginning) & mask) == 0 && cached->route &&
                nsn_pattern_matches(pattern, length, cached->subject, cached->length))
                drop(cache, i);
        }
    }
}

void nsn_cache_drop(struct nsn_cache *cache, const char *pattern, size_t length, uint64_t seed)
{
    if (!nsn_cache_count(cache))
        return;
    size_t prefix = nsn_pattern_literal_prefix(pattern, length);
    if (prefix < length) {
        if (length == 1 && pattern[0] == '>')
            nsn_cache_clear(cache);
        else
            drop_wildcard(cache, pattern, length, prefix);
        return;
    }
    struct nsn_cached *cached = nsn_cache_find(cache, pattern, length, nsn_hash(pattern, length, seed));
    if (cached)
        drop(cache, (uint32_t)(cached - cache->entries));
}
