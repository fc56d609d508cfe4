/* A chained hash table that doubles when it holds as many items as buckets. */
#include "nsn_table.h"

#include <errno.h>
#include <stdlib.h>

#define FIRST_BUCKETS 16

int nsn_table_init(struct nsn_table *table)
{
    table->buckets = calloc(FIRST_BUCKETS, sizeof(*table->buckets));
    table->mask = FIRST_BUCKETS - 1;
    table->count = 0;
    return table->buckets ? 0 : -ENOMEM;
}

void nsn_table_free(struct nsn_table *table)
{
    free(table->buckets);
    table->buckets = NULL;
    table->count = 0;
}

static void put(struct nsn_item **buckets, size_t mask, struct nsn_item *item)
{
    struct nsn_item **bucket = &buckets[item->hash & mask];
    item->next = *bucket;
    *bucket = item;
}

static void grow(struct nsn_table *table)
{
    size_t mask = table->mask * 2 + 1;
    struct nsn_item **buckets = calloc(mask + 1, sizeof(*buckets));
    if (!buckets)
        return;
    for (size_t i = 0; i <= table->mask; i++)
        for (struct nsn_item *item = table->buckets[i], *next; item; item = next) {
            next = item->next;
            put(buckets, mask, item);
        }
    free(table->buckets);
    table->buckets = buckets;
    table->mask = mask;
}

void nsn_table_insert(struct nsn_table *table, struct nsn_item *item, uint64_t hash)
{
    if (table->count > table->mask)
        grow(table);
    item->hash = hash;
    put(table->buckets, table->mask, item);
    table->count++;
}

void nsn_table_remove(struct nsn_table *table, struct nsn_item *item)
{
    struct nsn_item **link = &table->buckets[item->hash & table->mask];
    while (*link != item)
        link = &(*link)->next;
    *link = item->next;
    table->count--;
}

size_t nsn_table_bytes(const struct nsn_table *table) { return (table->mask + 1) * sizeof(*table->buckets); }
