/* A session's own subscriptions: their table, maxima, and what is kept of them until nothing can reach them any more. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nsn_session_internal.h"

#define TOMBSTONE ((struct nsn_subscription *)1)

static uint32_t place_of(const struct nsn_subscriptions *table, uint32_t sid)
{
    return (sid * 2654435769u) & (table->size - 1);
}

struct nsn_subscription *nsn_subscription_find(struct nsn_session *s, uint32_t sid)
{
    const struct nsn_subscriptions *table = &s->subscriptions;
    if (!table->size)
        return NULL;
    for (uint32_t at = place_of(table, sid);; at = (at + 1) & (table->size - 1)) {
        struct nsn_subscription *entry = table->entries[at];
        if (!entry)
            return NULL;
        if (entry != TOMBSTONE && entry->sid == sid)
            return entry;
    }
}

static int grow(struct nsn_subscriptions *table)
{
    uint32_t old_size = table->size, kept = table->live + table->ghosts;
    uint32_t size = 64;
    while (size < kept * 2 + 2)
        size *= 2;
    struct nsn_subscription **old = table->entries, **entries = calloc(size, sizeof *entries);
    if (!entries)
        return -ENOMEM;
    table->entries = entries;
    table->size = size;
    table->used = kept;
    for (uint32_t i = 0; i < old_size; i++) {
        if (!old[i] || old[i] == TOMBSTONE)
            continue;
        uint32_t at = place_of(table, old[i]->sid);
        while (entries[at])
            at = (at + 1) & (size - 1);
        entries[at] = old[i];
    }
    free(old);
    return 0;
}

static int insert(struct nsn_session *s, struct nsn_subscription *subscription)
{
    struct nsn_subscriptions *table = &s->subscriptions;
    if ((table->used + 1) * 4 > table->size * 3 && grow(table) < 0)
        return -ENOMEM;
    uint32_t at = place_of(table, subscription->sid);
    while (table->entries[at])
        at = (at + 1) & (table->size - 1);
    table->entries[at] = subscription;
    table->used++;
    table->live++;
    return 0;
}

static void forget(struct nsn_session *s, uint32_t at)
{
    struct nsn_subscriptions *table = &s->subscriptions;
    free(table->entries[at]->names);
    free(table->entries[at]);
    table->entries[at] = TOMBSTONE;
}

void nsn_subscriptions_free(struct nsn_session *s)
{
    struct nsn_subscriptions *table = &s->subscriptions;
    for (uint32_t i = 0; i < table->size; i++)
        if (table->entries[i] && table->entries[i] != TOMBSTONE)
            forget(s, i);
    free(table->entries);
    *table = (struct nsn_subscriptions){0};
}

/* Plain subscriptions are forgotten at once: what still comes for them is discarded as unknown. A queue subscription stays
 * as a ghost, so that what still comes can be passed on to another member of its group. */
void nsn_subscription_remove(struct nsn_session *s, struct nsn_subscription *subscription)
{
    struct nsn_subscriptions *table = &s->subscriptions;
    if (subscription->state == NSN_SUB_GHOST)
        return;
    table->live--;
    if (s->page)
        NSN_GAUGE(s, subscriptions, table->live);
    if (subscription->queue_length) {
        subscription->state = NSN_SUB_GHOST;
        subscription->removed_sequence = s->sequence + (s->batch ? 1 : 0);
        table->ghosts++;
        return;
    }
    uint32_t at = place_of(table, subscription->sid);
    while (table->entries[at] != subscription)
        at = (at + 1) & (table->size - 1);
    forget(s, at);
}

/* Once every publisher has been seen outside since the removals were in the log, and the links are read to where they
 * stood then, nothing can reach the ghosts any more. */
void nsn_ghosts_step(struct nsn_session *s)
{
    struct nsn_subscriptions *table = &s->subscriptions;
    if (!table->ghosts)
        return;
    if (!s->ghost_barrier) {
        s->ghost_sequence = s->sequence;
        s->ghost_barrier = nsn_barrier_start(s);
        if (s->ghost_barrier < 0)
            s->ghost_barrier = 0;
        return;
    }
    if (nsn_barrier_step(s, s->ghost_barrier) == 0)
        return;
    s->ghost_barrier = 0;
    for (uint32_t i = 0; i < table->size; i++) {
        struct nsn_subscription *entry = table->entries[i];
        if (entry && entry != TOMBSTONE && entry->state == NSN_SUB_GHOST && entry->removed_sequence <= s->ghost_sequence) {
            forget(s, i);
            table->ghosts--;
        }
    }
}

static int subscribe(struct nsn_session *s, uint32_t sid, const char *pattern, size_t pattern_length, const char *queue,
                     size_t queue_length)
{
    if (pattern_length > NSN_SUBJECT_MAX || queue_length > NSN_SUBJECT_MAX)
        return nsn_fail(s, -EINVAL, "a subject or queue name of %zu bytes is longer than the limit of %d",
                        pattern_length > queue_length ? pattern_length : queue_length, NSN_SUBJECT_MAX);
    if (!nsn_pattern_valid(pattern, pattern_length))
        return nsn_fail(s, -EINVAL, "\"%.*s\" is not a valid subject: no token may be empty, and '>' must come last",
                        (int)(pattern_length < 100 ? pattern_length : 100), pattern);
    struct nsn_subscription *old = nsn_subscription_find(s, sid);
    if (old && old->state != NSN_SUB_GHOST)
        return -EEXIST;
    struct nsn_subscription *subscription = old ? old : calloc(1, sizeof *subscription);
    char *names = malloc(pattern_length + queue_length + 1);
    if (!subscription || !names) {
        if (!old)
            free(subscription);
        free(names);
        return nsn_fail(s, -ENOMEM, "no memory for a subscription");
    }
    memcpy(names, pattern, pattern_length);
    memcpy(names + pattern_length, queue, queue_length);
    if (old) {
        free(old->names);
        s->subscriptions.ghosts--;
        s->subscriptions.live++;
    }
    *subscription = (struct nsn_subscription){.sid = sid, .state = NSN_SUB_LIVE, .pattern_length = (uint16_t)pattern_length,
                                              .queue_length = (uint16_t)queue_length, .names = names};
    if (!old && insert(s, subscription) < 0) {
        free(names);
        free(subscription);
        return nsn_fail(s, -ENOMEM, "no memory for a subscription");
    }
    if (s->page)
        NSN_GAUGE(s, subscriptions, s->subscriptions.live);
    return nsn_interest_queue(s, NSN_INTEREST_ADD, sid, pattern, pattern_length, queue, queue_length);
}

int nsn_subscribe(struct nsn_session *s, uint32_t sid, const char *pattern, size_t pattern_length, const char *queue,
                  size_t queue_length)
{
    if (nsn_in_child(s))
        return nsn_fail(s, -ECHILD, NSN_FORKED);
    pthread_mutex_lock(&s->lock);
    int result = subscribe(s, sid, pattern, pattern_length, queue, queue_length);
    pthread_mutex_unlock(&s->lock);
    return result;
}

int nsn_unsubscribe(struct nsn_session *s, uint32_t sid, uint64_t max)
{
    if (nsn_in_child(s))
        return nsn_fail(s, -ECHILD, NSN_FORKED);
    pthread_mutex_lock(&s->lock);
    struct nsn_subscription *subscription = nsn_subscription_find(s, sid);
    int result = 0;
    if (subscription && subscription->state != NSN_SUB_GHOST) {
        subscription->max = max;
        if (max == 0 || subscription->delivered >= max) {
            if (subscription->state == NSN_SUB_LIVE)
                result = nsn_interest_queue(s, NSN_INTEREST_REMOVE, sid, "", 0, "", 0);
            nsn_subscription_remove(s, subscription);
        }
    }
    pthread_mutex_unlock(&s->lock);
    return result;
}

int nsn_drain(struct nsn_session *s, uint32_t sid)
{
    if (nsn_in_child(s))
        return nsn_fail(s, -ECHILD, NSN_FORKED);
    pthread_mutex_lock(&s->lock);
    struct nsn_subscription *subscription = nsn_subscription_find(s, sid);
    int result = 0;
    if (subscription && subscription->state == NSN_SUB_LIVE) {
        subscription->state = NSN_SUB_DRAINING;
        result = nsn_interest_queue(s, NSN_INTEREST_REMOVE, sid, "", 0, "", 0);
    }
    pthread_mutex_unlock(&s->lock);
    return result;
}

int nsn_interest_settled(struct nsn_session *s, uint64_t spin_ns)
{
    if (nsn_in_child(s))
        return nsn_fail(s, -ECHILD, NSN_FORKED);
    pthread_mutex_lock(&s->lock);
    nsn_interest_flush(s);
    int known = nsn_interest_known(s);
    pthread_mutex_unlock(&s->lock);
    if (known || !spin_ns || s->state != NSN_READY)
        return known;
    uint64_t until = nsn_now_ns() + spin_ns;
    do {
        for (int i = 0; i < 64; i++)
            nsn_cpu_relax();
        pthread_mutex_lock(&s->lock);
        known = nsn_interest_known(s);
        pthread_mutex_unlock(&s->lock);
    } while (!known && nsn_now_ns() < until);
    return known;
}
