/* A relay's insides, shared by the nsn_relay*.c files. One thread has all of it. */
#ifndef NSN_RELAY_INTERNAL_H
#define NSN_RELAY_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nsn_permissions.h"
#include "nsn_relay.h"
#include "nsn_relay_bytes.h"
#include "nsn_relays.h"
#include "nsn_replies.h"
#include "nsn_session.h"
#include "nsn_shared.h"
#include "nsn_table.h"

#define LINE_MAX_BYTES 4096u      /* arguments of a line */
#define OUT_MAX (4u << 20)        /* bytes that wait for the client; above, nothing more is taken from the fabric for it */
#define BATCH 256
#define BLOB_SIZE (256u << 10)

struct nsn_relay_subscription {
    struct nsn_item item; /* by sid */
    struct nsn_relay_subscription *next, **at; /* in their order; what points to this one */
    uint32_t sid;
    uint64_t delivered;
    int ending; /* unsubscribed, and gone with this barrier; 0: it is not */
    size_t pattern_length, queue_length;
    char text[]; /* pattern, queue */
};

struct nsn_relay {
    const struct nsn_relay_options *options;
    const struct nsn_permissions *may;
    struct nsn_replies *replies;
    struct nsn_session *session;
    struct nsn_session_info info;
    struct nsn_relay *neighbour; /* in the node's relays */
    int client;
    struct nsn_bytes in, out;
    struct nsn_relay_subscription *subscriptions, **last_subscription;
    struct nsn_table by_sid;
    uint32_t ending;    /* how many of them are */
    bool verbose, pedantic, no_echo, headers, no_responders;
    bool ended;         /* the client has said all that it will */
    bool over;          /* nothing more is read from it */
    bool broken;        /* nothing more is written to it */
    bool checked;       /* the line at the front of `in` was, and waits for the fabric */
    uint64_t waits_since; /* a publish waits for room */
    uint64_t unread_since; /* the client has taken nothing while too much waits for it */
    bool trimmed;       /* idle, and there is no memory left to give back */
    int look_ms;        /* the next sleep, while nobody rings for what it waits for */
    int pong;           /* barrier behind which PONG is due; 0: none */
    int count, next;    /* of messages; those from next on wait until the client reads */
    struct nsn_message messages[BATCH];
    uint8_t blob[BLOB_SIZE];
};

/* The next line is not whole; is whole and waits for the fabric; is dealt with. */
enum nsn_relay_step { MORE, WAIT, DONE };

struct nsn_word {
    const char *at;
    size_t length;
};

/* What holds from now on. Pairs with the store in nsn_relay_permit(). */
static inline const struct nsn_permissions *nsn_relay_permissions(const struct nsn_relay_options *options)
{
    return __atomic_load_n(&options->permissions, __ATOMIC_ACQUIRE);
}

static inline bool nsn_relay_is_full(const struct nsn_relay *r) { return nsn_bytes_length(&r->out) > OUT_MAX; }
static inline bool nsn_relay_holds(const struct nsn_relay *r) { return r->next < r->count; }

/* to the client (nsn_relay_out.c) */
void nsn_relay_put(struct nsn_relay *r, const void *bytes, size_t length);
void nsn_relay_say(struct nsn_relay *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Says -ERR, and reads nothing more. */
void nsn_relay_fail(struct nsn_relay *r, const char *words);
void nsn_relay_ok(struct nsn_relay *r);
void nsn_relay_put_message(struct nsn_relay *r, uint32_t sid, struct nsn_word subject, struct nsn_word reply,
                           const uint8_t *headers, size_t header_length, const uint8_t *payload, size_t payload_length);
/* As much as the client takes. */
void nsn_relay_send(struct nsn_relay *r);

/* from the client (nsn_relay_lines.c) */
void nsn_relay_read(struct nsn_relay *r);
enum nsn_relay_step nsn_relay_take_line(struct nsn_relay *r);

/* subscriptions (nsn_relay_subscriptions.c) */
void nsn_relay_subscribe(struct nsn_relay *r, uint32_t sid, struct nsn_word pattern, struct nsn_word queue);
void nsn_relay_unsubscribe(struct nsn_relay *r, uint32_t sid, int64_t most);
void nsn_relay_end_subscriptions(struct nsn_relay *r);
void nsn_relay_free_subscriptions(struct nsn_relay *r);
void nsn_relay_renew_permissions(struct nsn_relay *r);
bool nsn_relay_deliver(struct nsn_relay *r);

/* publishing (nsn_relay_publish.c) */
enum nsn_relay_step nsn_relay_publish(struct nsn_relay *r, struct nsn_word subject, struct nsn_word reply,
                                      const uint8_t *headers, size_t header_length, const uint8_t *payload,
                                      size_t payload_length);

/* the other relays (nsn_relays.c) */
void nsn_relays_add(struct nsn_relays *relays, struct nsn_relay *relay);
/* Harmless when it was not added. */
void nsn_relays_remove(struct nsn_relays *relays, struct nsn_relay *relay);
/* For sessions. context: the relay that asks. */
int nsn_relays_may_have(void *context, const struct nsn_receiver *receiver);

#endif
