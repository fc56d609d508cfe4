/* A session's own index of interest: subject -> subscriptions, with a cache of resolved subjects. Private memory only.
 *
 * The index is a tree of tokens. Lookups of cached subjects cost the same whatever else is subscribed. A change drops from
 * the cache only the subjects that it matches. The cache is bounded; subjects beyond it are matched in the tree each time.
 */
#ifndef NSN_ROUTE_H
#define NSN_ROUTE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A subscription's place: the session's slot and the slot's generation (see nsn_slots.h), and the id that session gave it. */
struct nsn_target {
    uint32_t slot;
    uint32_t generation;
    uint32_t sid;
};

/* The members of one queue group that match a subject, over all matching patterns of that group. */
struct nsn_route_queue {
    const char *name;
    uint16_t name_length;
    uint32_t count;
    const struct nsn_target *members;
};

/* What one subject matches. Plain targets are sorted by slot, so that those of one session stand together. */
struct nsn_route {
    uint32_t plain_count;
    const struct nsn_target *plain;
    uint32_t queue_count;
    const struct nsn_route_queue *queues;
};

struct nsn_routes;

/* cache_entries: bound of the cache, 0 for the default (4096). NULL when there is no memory. */
struct nsn_routes *nsn_routes_new(size_t cache_entries);
void nsn_routes_free(struct nsn_routes *routes);

/* 0; -EEXIST when (slot, generation, sid) is there already (the first stays); -EINVAL for an invalid pattern; -ENOMEM.
 * An empty queue name means a plain subscription. The strings are copied. */
int nsn_routes_add(struct nsn_routes *routes, struct nsn_target target, const char *pattern, size_t pattern_length,
                   const char *queue, size_t queue_length);

/* 0, or -ENOENT. */
int nsn_routes_remove(struct nsn_routes *routes, struct nsn_target target);

/* Removes all of one session; returns how many there were. */
size_t nsn_routes_remove_session(struct nsn_routes *routes, uint32_t slot, uint32_t generation);

void nsn_routes_clear(struct nsn_routes *routes);

/* Calls back just before a subscription of a queue group goes (*sid), before a whole session's go (sid NULL), and before all
 * go because they are read anew (slot UINT32_MAX): while they can still be asked for. */
typedef void (*nsn_routes_parting)(void *context, uint32_t slot, uint32_t generation, const uint32_t *sid);
void nsn_routes_on_parting(struct nsn_routes *routes, nsn_routes_parting parting, void *context);

/* The queue group of a subscription: 1 and its name (valid until the next change), or 0: plain, or not known. */
int nsn_routes_queue_of(const struct nsn_routes *routes, struct nsn_target target, const char **name, size_t *length);

/* Never NULL except for -ENOMEM inside; an unroutable subject has an empty route. The route stays valid until the next
 * call that takes this nsn_routes. */
const struct nsn_route *nsn_routes_lookup(struct nsn_routes *routes, const char *subject, size_t length);

/* Number of subscriptions held, of cached subjects, and bytes of memory in use. */
size_t nsn_routes_count(const struct nsn_routes *routes);
size_t nsn_routes_cached(const struct nsn_routes *routes);
size_t nsn_routes_bytes(const struct nsn_routes *routes);

#endif
