/* The reply subjects that one client may answer to, since it was sent a message with them. */
#ifndef NSN_REPLIES_H
#define NSN_REPLIES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct nsn_permissions;

/* The last 4,096 are known. */
struct nsn_replies;
/* NULL: no memory. */
struct nsn_replies *nsn_replies_new(void);
void nsn_replies_free(struct nsn_replies *replies);
/* A message with this reply subject goes to the client, which has a right to answer from now on. As with a nats-server, one
 * that it has already stays as it is, and this message counts as an answer. */
void nsn_replies_heard(struct nsn_replies *replies, const struct nsn_permissions *permissions, const char *reply, size_t length,
                       uint64_t now_ns);
/* True when it may, which counts as one answer. */
bool nsn_replies_answer(struct nsn_replies *replies, const struct nsn_permissions *permissions, const char *subject,
                        size_t length, uint64_t now_ns);

#endif
