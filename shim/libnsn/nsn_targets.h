/* A set of subscriptions, found by (slot, generation, sid) and by session. Each is an entry inside a struct of the user's. */
#ifndef NSN_TARGETS_H
#define NSN_TARGETS_H

#include "nsn_route.h"
#include "nsn_table.h"

struct nsn_targets_entry {
    struct nsn_item item;
    struct nsn_targets_entry *previous, *next; /* of the same session */
    struct nsn_targets_session *session;
    struct nsn_target target;
};

struct nsn_targets_session {
    struct nsn_item item;
    struct nsn_targets_entry *first;
    size_t count;
    uint32_t slot, generation;
};

struct nsn_targets {
    struct nsn_table entries, sessions;
};

/* 0 or -ENOMEM. */
int nsn_targets_init(struct nsn_targets *targets);
/* The set must be empty. */
void nsn_targets_free(struct nsn_targets *targets);
/* 0, -EEXIST, -ENOMEM. */
int nsn_targets_add(struct nsn_targets *targets, struct nsn_targets_entry *entry, struct nsn_target target);
/* A session ends with its last entry. */
void nsn_targets_remove(struct nsn_targets *targets, struct nsn_targets_entry *entry);
struct nsn_targets_entry *nsn_targets_find(const struct nsn_targets *targets, struct nsn_target target);
struct nsn_targets_session *nsn_targets_session(const struct nsn_targets *targets, uint32_t slot, uint32_t generation);
/* Any entry, NULL when the set is empty; *bucket is 0 at first and remembers how far the search came. */
struct nsn_targets_entry *nsn_targets_any(const struct nsn_targets *targets, size_t *bucket);
size_t nsn_targets_bytes(const struct nsn_targets *targets); /* entries apart */

#endif
