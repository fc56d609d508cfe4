#include "nsn_replies.h"

#include <stdlib.h>
#include <string.h>

#include "nsn_permissions.h"
#include "nsn_table.h"

#define REPLIES_MAX 4096u
#define BUCKETS (2 * REPLIES_MAX)

struct reply {
    struct reply *next; /* in its bucket */
    uint64_t hash;
    char *subject;      /* NULL: free */
    size_t length;
    uint64_t heard_ns;
    uint32_t answered;
};

struct nsn_replies {
    uint64_t seed;
    uint32_t oldest;    /* the next one replaces it */
    struct reply all[REPLIES_MAX];
    struct reply *buckets[BUCKETS];
};

struct nsn_replies *nsn_replies_new(void)
{
    struct nsn_replies *replies = calloc(1, sizeof *replies);
    if (replies)
        replies->seed = (uintptr_t)replies; /* others choose the subjects, and are not to know which meet in one bucket */
    return replies;
}

void nsn_replies_free(struct nsn_replies *replies)
{
    for (uint32_t i = 0; replies && i < REPLIES_MAX; i++)
        free(replies->all[i].subject);
    free(replies);
}

static struct reply **bucket(struct nsn_replies *replies, uint64_t hash) { return &replies->buckets[hash % BUCKETS]; }

static struct reply *find(struct nsn_replies *replies, uint64_t hash, const char *subject, size_t length)
{
    struct reply *reply = *bucket(replies, hash);
    while (reply && (reply->hash != hash || reply->length != length || memcmp(reply->subject, subject, length) != 0))
        reply = reply->next;
    return reply;
}

static void forget(struct nsn_replies *replies, struct reply *reply)
{
    struct reply **at = bucket(replies, reply->hash);
    while (*at != reply)
        at = &(*at)->next;
    *at = reply->next;
    free(reply->subject);
    *reply = (struct reply){0};
}

static void remember(struct nsn_replies *replies, uint64_t hash, const char *subject, size_t length, uint64_t now_ns)
{
    struct reply *one = &replies->all[replies->oldest++ % REPLIES_MAX];
    if (one->subject)
        forget(replies, one);
    char *copy = malloc(length);
    if (!copy)
        return;
    memcpy(copy, subject, length);
    struct reply **first = bucket(replies, hash);
    *one = (struct reply){.next = *first, .hash = hash, .subject = copy, .length = length, .heard_ns = now_ns};
    *first = one;
}

bool nsn_replies_answer(struct nsn_replies *replies, const struct nsn_permissions *permissions, const char *subject,
                        size_t length, uint64_t now_ns)
{
    uint64_t expires_ns;
    uint32_t most = nsn_permissions_answers(permissions, &expires_ns);
    struct reply *reply = most ? find(replies, nsn_hash(subject, length, replies->seed), subject, length) : NULL;
    if (!reply)
        return false;
    if (++reply->answered > most || now_ns - reply->heard_ns > expires_ns) {
        forget(replies, reply);
        return false;
    }
    return true;
}

void nsn_replies_heard(struct nsn_replies *replies, const struct nsn_permissions *permissions, const char *reply, size_t length,
                       uint64_t now_ns)
{
    uint64_t expires_ns;
    if (!length || !nsn_permissions_answers(permissions, &expires_ns) || nsn_may_publish(permissions, reply, length) ||
        nsn_replies_answer(replies, permissions, reply, length, now_ns))
        return;
    remember(replies, nsn_hash(reply, length, replies->seed), reply, length, now_ns);
}
