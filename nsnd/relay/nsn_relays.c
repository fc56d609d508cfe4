#include "nsn_relays.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "nsn_relay_internal.h"

#define BUCKETS 512u

struct nsn_relays {
    pthread_mutex_t lock;
    struct nsn_relay *buckets[BUCKETS]; /* by slot */
};

struct nsn_relays *nsn_relays_new(void)
{
    struct nsn_relays *relays = calloc(1, sizeof *relays);
    if (relays)
        pthread_mutex_init(&relays->lock, NULL);
    return relays;
}

void nsn_relays_add(struct nsn_relays *relays, struct nsn_relay *relay)
{
    pthread_mutex_lock(&relays->lock);
    struct nsn_relay **first = &relays->buckets[relay->info.slot % BUCKETS];
    relay->neighbour = *first;
    *first = relay;
    pthread_mutex_unlock(&relays->lock);
}

void nsn_relays_remove(struct nsn_relays *relays, struct nsn_relay *relay)
{
    pthread_mutex_lock(&relays->lock);
    struct nsn_relay **at = &relays->buckets[relay->info.slot % BUCKETS];
    while (*at && *at != relay)
        at = &(*at)->neighbour;
    if (*at)
        *at = relay->neighbour;
    pthread_mutex_unlock(&relays->lock);
}

/* Slots are numbered in each application ID's, and account's, directory. */
static bool is_at(const struct nsn_relay *relay, const struct nsn_relay *beside, const struct nsn_receiver *receiver)
{
    return relay->info.slot == receiver->slot && relay->info.generation == receiver->generation &&
           strcmp(relay->info.directory, beside->info.directory) == 0;
}

static bool may_hear(const struct nsn_permissions *permissions, const struct nsn_receiver *receiver)
{
    return nsn_may_hear(permissions, receiver->subject, receiver->subject_length, receiver->queue, receiver->queue_length);
}

int nsn_relays_may_have(void *context, const struct nsn_receiver *receiver)
{
    const struct nsn_relay *asking = context;
    if (is_at(asking, asking, receiver))
        return may_hear(asking->may, receiver);
    struct nsn_relays *relays = asking->options->relays;
    pthread_mutex_lock(&relays->lock);
    const struct nsn_relay *relay = relays->buckets[receiver->slot % BUCKETS];
    while (relay && !is_at(relay, asking, receiver))
        relay = relay->neighbour;
    bool may = !relay || may_hear(nsn_relay_permissions(relay->options), receiver);
    pthread_mutex_unlock(&relays->lock);
    return may;
}
