/* What a user may publish and subscribe to: lists of patterns, with the rules of nats-server 2.15. */
#ifndef NSN_PERMISSIONS_H
#define NSN_PERMISSIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct nsn_permissions;

enum nsn_permission_list { NSN_PUBLISH_ALLOW = 0, NSN_PUBLISH_DENY = 1, NSN_SUBSCRIBE_ALLOW = 2, NSN_SUBSCRIBE_DENY = 3 };

/* Everything is allowed. NULL: no memory. */
struct nsn_permissions *nsn_permissions_new(void);
void nsn_permissions_free(struct nsn_permissions *permissions);

/* From now on only what is in this list of what is allowed is; nothing while it is empty. */
void nsn_permissions_restrict(struct nsn_permissions *permissions, int list);

/* A pattern for a list, of subscriptions with a queue group's name (a pattern too) or "". The strings are copied. 0,
 * -ENOMEM. */
int nsn_permissions_add(struct nsn_permissions *permissions, int list, const char *pattern, size_t pattern_length,
                        const char *queue, size_t queue_length);

/* What is delivered with a reply subject may be answered there, `most` times, for that long. */
void nsn_permissions_responses(struct nsn_permissions *permissions, uint32_t most, uint64_t expires_ns);

/* How often, or 0: never; and for how long. */
uint32_t nsn_permissions_answers(const struct nsn_permissions *permissions, uint64_t *expires_ns);

bool nsn_may_publish(const struct nsn_permissions *permissions, const char *subject, size_t length);
bool nsn_may_subscribe(const struct nsn_permissions *permissions, const char *pattern, size_t pattern_length, const char *queue,
                       size_t queue_length);
/* Whether what was published to the subject may reach a subscription that was allowed: not where a denied pattern is part of
 * its wildcards. */
bool nsn_may_hear(const struct nsn_permissions *permissions, const char *subject, size_t length, const char *queue,
                  size_t queue_length);

#endif
