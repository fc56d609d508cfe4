/* A set of subscriptions: one table of targets, one of sessions, and a list from each session through its targets. */
#include "nsn_targets.h"

#include <errno.h>
#include <stdlib.h>

static uint64_t session_hash(uint32_t slot, uint32_t generation)
{
    return nsn_mix((uint64_t)generation << 32 ^ slot ^ 0x8ebc6af09c88c6e3ull, 0x589965cc75374cc3ull);
}

static uint64_t target_hash(struct nsn_target target)
{
    return nsn_mix(session_hash(target.slot, target.generation) ^ target.sid, 0xa0761d6478bd642full);
}

int nsn_targets_init(struct nsn_targets *targets)
{
    memset(targets, 0, sizeof(*targets));
    int result = nsn_table_init(&targets->entries);
    return result ? result : nsn_table_init(&targets->sessions);
}

void nsn_targets_free(struct nsn_targets *targets)
{
    nsn_table_free(&targets->entries);
    nsn_table_free(&targets->sessions);
}

struct nsn_targets_entry *nsn_targets_find(const struct nsn_targets *targets, struct nsn_target target)
{
    for (struct nsn_item *item = nsn_table_first(&targets->entries, target_hash(target)); item; item = nsn_table_next(item)) {
        struct nsn_targets_entry *entry = nsn_container_of(item, struct nsn_targets_entry, item);
        if (entry->target.slot == target.slot && entry->target.generation == target.generation &&
            entry->target.sid == target.sid)
            return entry;
    }
    return NULL;
}

struct nsn_targets_session *nsn_targets_session(const struct nsn_targets *targets, uint32_t slot, uint32_t generation)
{
    struct nsn_item *item = nsn_table_first(&targets->sessions, session_hash(slot, generation));
    for (; item; item = nsn_table_next(item)) {
        struct nsn_targets_session *session = nsn_container_of(item, struct nsn_targets_session, item);
        if (session->slot == slot && session->generation == generation)
            return session;
    }
    return NULL;
}

static struct nsn_targets_session *session_for(struct nsn_targets *targets, uint32_t slot, uint32_t generation)
{
    struct nsn_targets_session *session = nsn_targets_session(targets, slot, generation);
    if (session)
        return session;
    session = calloc(1, sizeof(*session));
    if (!session)
        return NULL;
    session->slot = slot;
    session->generation = generation;
    nsn_table_insert(&targets->sessions, &session->item, session_hash(slot, generation));
    return session;
}

int nsn_targets_add(struct nsn_targets *targets, struct nsn_targets_entry *entry, struct nsn_target target)
{
    if (nsn_targets_find(targets, target))
        return -EEXIST;
    struct nsn_targets_session *session = session_for(targets, target.slot, target.generation);
    if (!session)
        return -ENOMEM;
    entry->target = target;
    entry->session = session;
    entry->previous = NULL;
    entry->next = session->first;
    if (entry->next)
        entry->next->previous = entry;
    session->first = entry;
    session->count++;
    nsn_table_insert(&targets->entries, &entry->item, target_hash(target));
    return 0;
}

void nsn_targets_remove(struct nsn_targets *targets, struct nsn_targets_entry *entry)
{
    struct nsn_targets_session *session = entry->session;
    if (entry->next)
        entry->next->previous = entry->previous;
    if (entry->previous)
        entry->previous->next = entry->next;
    else
        session->first = entry->next;
    nsn_table_remove(&targets->entries, &entry->item);
    if (--session->count)
        return;
    nsn_table_remove(&targets->sessions, &session->item);
    free(session);
}

struct nsn_targets_entry *nsn_targets_any(const struct nsn_targets *targets, size_t *bucket)
{
    for (; *bucket <= targets->entries.mask; ++*bucket)
        if (targets->entries.buckets[*bucket])
            return nsn_container_of(targets->entries.buckets[*bucket], struct nsn_targets_entry, item);
    return NULL;
}

size_t nsn_targets_bytes(const struct nsn_targets *targets)
{
    return nsn_table_bytes(&targets->entries) + nsn_table_bytes(&targets->sessions) +
           targets->sessions.count * sizeof(struct nsn_targets_session);
}
