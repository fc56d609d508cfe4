#include "nsn_permissions.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nsn_subject.h"

struct entry {
    struct entry *next;
    size_t pattern_length, queue_length;
    char text[]; /* pattern, queue */
};

struct nsn_permissions {
    struct entry *lists[4];
    bool restricted[4];
    uint32_t responses; /* 0: none */
    uint64_t expires_ns;
};

struct nsn_permissions *nsn_permissions_new(void) { return calloc(1, sizeof(struct nsn_permissions)); }

void nsn_permissions_free(struct nsn_permissions *permissions)
{
    if (!permissions)
        return;
    for (int list = 0; list < 4; list++)
        for (struct entry *entry; (entry = permissions->lists[list]);) {
            permissions->lists[list] = entry->next;
            free(entry);
        }
    free(permissions);
}

void nsn_permissions_restrict(struct nsn_permissions *permissions, int list) { permissions->restricted[list] = true; }

int nsn_permissions_add(struct nsn_permissions *permissions, int list, const char *pattern, size_t pattern_length,
                        const char *queue, size_t queue_length)
{
    struct entry *entry = malloc(sizeof *entry + pattern_length + queue_length);
    if (!entry)
        return -ENOMEM;
    *entry = (struct entry){permissions->lists[list], pattern_length, queue_length};
    memcpy(entry->text, pattern, pattern_length);
    memcpy(entry->text + pattern_length, queue, queue_length);
    permissions->lists[list] = entry;
    permissions->restricted[list] = true;
    return 0;
}

void nsn_permissions_responses(struct nsn_permissions *permissions, uint32_t most, uint64_t expires_ns)
{
    permissions->responses = most;
    permissions->expires_ns = expires_ns;
}

uint32_t nsn_permissions_answers(const struct nsn_permissions *permissions, uint64_t *expires_ns)
{
    *expires_ns = permissions->expires_ns;
    return permissions->responses;
}

static bool covers(const struct entry *entry, const char *subject, size_t length)
{
    return nsn_pattern_matches(entry->text, entry->pattern_length, subject, length);
}

static bool is_listed(const struct entry *entry, const char *subject, size_t length)
{
    while (entry && !covers(entry, subject, length))
        entry = entry->next;
    return entry != NULL;
}

/* A subject with an empty token, which nobody can receive, is in no list. */
bool nsn_may_publish(const struct nsn_permissions *permissions, const char *subject, size_t length)
{
    bool routable = nsn_subject_routable(subject, length);
    if (permissions->restricted[NSN_PUBLISH_ALLOW] &&
        !(routable && is_listed(permissions->lists[NSN_PUBLISH_ALLOW], subject, length)))
        return false;
    return !routable || !is_listed(permissions->lists[NSN_PUBLISH_DENY], subject, length);
}

static bool ends_open(const char *pattern, size_t length)
{
    return length && pattern[length - 1] == '>' && (length == 1 || pattern[length - 2] == '.');
}

/* Entries without a queue group say yes or no; where a subscription has one and there are entries with some for its subject,
 * these decide. */
static bool found(const struct entry *list, const char *subject, size_t length, const char *queue, size_t queue_length,
                  bool whole)
{
    bool plain = false, of_queues = false, of_this = false;
    for (const struct entry *entry = list; entry; entry = entry->next) {
        if (!covers(entry, subject, length))
            continue;
        /* "*" matches ">" as it matches any token, and does not stand for as much. (nats-server takes it for that.) */
        if (whole && ends_open(subject, length) && !ends_open(entry->text, entry->pattern_length))
            continue;
        if (!entry->queue_length) {
            plain = true;
            continue;
        }
        of_queues = true;
        of_this |= nsn_pattern_matches(entry->text + entry->pattern_length, entry->queue_length, queue, queue_length);
    }
    return queue_length && of_queues ? of_this : plain;
}

bool nsn_may_subscribe(const struct nsn_permissions *permissions, const char *pattern, size_t pattern_length, const char *queue,
                       size_t queue_length)
{
    if (permissions->restricted[NSN_SUBSCRIBE_ALLOW] &&
        !found(permissions->lists[NSN_SUBSCRIBE_ALLOW], pattern, pattern_length, queue, queue_length, true))
        return false;
    return !found(permissions->lists[NSN_SUBSCRIBE_DENY], pattern, pattern_length, queue, queue_length, false);
}

bool nsn_may_hear(const struct nsn_permissions *permissions, const char *subject, size_t length, const char *queue,
                  size_t queue_length)
{
    return !found(permissions->lists[NSN_SUBSCRIBE_DENY], subject, length, queue, queue_length, false);
}
