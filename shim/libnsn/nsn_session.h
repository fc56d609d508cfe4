/* A session: one program's attachment to the fabric of one application ID. A NATS connection is one session.
 *
 * Everything here takes the session's lock, so a session may be used from several threads. Nothing blocks, but for the
 * bounded spins that say so and nsn_session_doze. Errors are negative errnos; nsn_session_error() has the words of the last.
 *
 * Life: open -> (descriptor readable: process) until ready -> publish, receive … -> close. When nsnd goes away the state is
 * DETACHED: local traffic goes on; reattach() connects again; interest and links are reconciled by themselves.
 */
#ifndef NSN_SESSION_H
#define NSN_SESSION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct nsn_session;

/* A subscription, and what it is to get. */
struct nsn_receiver {
    uint32_t slot, generation;    /* of its session */
    const char *subject, *queue;
    size_t subject_length, queue_length;
};

struct nsn_session_options {
    const char *socket_path;      /* nsnd's control socket */
    const char *name;             /* shown in status; "" for none */
    uint32_t application_id;
    int no_echo;                  /* own subscriptions get nothing of what this session publishes */
    int unreliable;               /* never wait: a full link drops, counted */
    uint64_t link_limit;          /* bytes of backlog a link holds; 0: 64 MiB, or a quarter of the budget */
    uint64_t budget;              /* bytes touched in links and pool; 0: nsn_budget_default (nsn_budget.h) */
    uint64_t write_deadline_ns;   /* how long a queue message that is passed on waits for a full member; 0: 10 s */
    uint64_t pending_size;        /* bytes kept while DETACHED for sessions that have no link yet; 0: 2 MiB */
    int answers;                  /* 1: who opens it looks for nsn_session_challenge() while CONNECTING, and answers. Else nsnd
                                     refuses it where it asks for credentials */
    int relay;                    /* 1: to be relayed, where it asks for credentials */
    int (*may_have)(void *context, const struct nsn_receiver *receiver); /* asked, with the session's lock held, before an own
                                     subscription gets a message, and before another session's, to which it is passed on: 0,
                                     it is not to. So it goes to another member of the queue group, or is dropped. NULL: all
                                     may have everything */
    void *context;                /* of may_have */
};

enum nsn_session_state { NSN_CONNECTING = 0, NSN_READY = 1, NSN_DETACHED = 2, NSN_REFUSED_STATE = 3, NSN_CLOSED = 4,
                        NSN_LOST = 5 };
/* LOST: reattached as a new session because nsnd no longer knew the old one (its runtime files were gone); links and interest
 * start anew. The caller subscribes again. It becomes READY by nsn_session_accept_loss(). */

/* Starts connecting (non-blocking). NULL with words in error. */
struct nsn_session *nsn_session_open(const struct nsn_session_options *options, char *error, size_t error_size);
/* Frees everything, large messages that were not released included; says GOODBYE when attached. What was published stays
 * readable by its consumers. */
void nsn_session_close(struct nsn_session *session);
/* In a forked child: unmaps and closes without touching shared words or the sockets' peers. */
void nsn_session_abandon(struct nsn_session *session);

int nsn_session_state(struct nsn_session *session);
const char *nsn_session_error(struct nsn_session *session);
int nsn_session_control_fd(struct nsn_session *session); /* changes at reattach; -1 when detached */
int nsn_session_bell_fd(struct nsn_session *session);    /* -1 before READY */
int nsn_session_forked(struct nsn_session *session);     /* 1 in a child of the process that opened it */

struct nsn_session_info {
    uint64_t client_id, max_payload;
    uint32_t slot, generation;
    uint32_t node_pid; /* nsnd's process, as the kernel says */
    char version[32];
    char directory[256];
};
int nsn_session_info(struct nsn_session *session, struct nsn_session_info *info);

/* Reads what nsnd sent and sends what is due. 1 when something changed, 0, or a negative errno (then DETACHED, REFUSED…).
 * spin_ns: waits that long for something first (for a round trip to nsnd that is worth spinning for). */
int nsn_session_process(struct nsn_session *session, uint64_t spin_ns);
/* 1 when nsnd waits for credentials, with the nonce (NUL-terminated, "" where nobody can sign one). 0: it does not. */
int nsn_session_challenge(struct nsn_session *session, char *nonce, size_t nonce_size);
/* The JSON object that a NATS client sends behind CONNECT. -EINVAL: nobody waits for it. -EMSGSIZE: it is too long. */
int nsn_session_answer(struct nsn_session *session, const uint8_t *json, size_t length);
/* While REFUSED_STATE, why: a positive errno. EKEYREJECTED: nsnd does not know these credentials, or no more. 0 else. */
int nsn_session_refusal(struct nsn_session *session);
/* The descriptor by which to talk to nsnd's relay in place of this session, which is to be closed, or -1: there is none. It is
 * the caller's. Only for who answers challenges. */
int nsn_session_relay(struct nsn_session *session);
/* Connects again after DETACHED or REFUSED_STATE (non-blocking; then process() until READY or LOST). */
int nsn_session_reattach(struct nsn_session *session, const char *socket_path);
int nsn_session_accept_loss(struct nsn_session *session);
/* True when bytes wait to be sent to nsnd (watch the control descriptor for writing). */
int nsn_session_unsent(struct nsn_session *session);

/* --- interest ---------------------------------------------------------------------------------------------------- */
/* Queued and sent in batches by the next process(), publish() or barrier. -EEXIST: sid in use. -EINVAL: pattern, lengths. */
int nsn_subscribe(struct nsn_session *session, uint32_t sid, const char *pattern, size_t pattern_length, const char *queue,
                  size_t queue_length);
/* max 0: now. Else after that many deliveries in all since subscribe (at once when they have been made already). */
int nsn_unsubscribe(struct nsn_session *session, uint32_t sid, uint64_t max);
/* Ends the interest, but what reached the subscription before is still delivered to it. When a barrier that began later is
 * done, nothing more can come: then nsn_unsubscribe(sid, 0). */
int nsn_drain(struct nsn_session *session, uint32_t sid);
/* 1 when nsnd has all interest changes in its log, 0 when not yet; spins up to spin_ns on the shared word. A change that
 * nsnd refused is reported as an event. */
int nsn_interest_settled(struct nsn_session *session, uint64_t spin_ns);

/* --- publish ----------------------------------------------------------------------------------------------------- */
/* Number of subscriptions it went to or was dropped for (0: nobody is interested). -EAGAIN: a link is full: nothing was
 * written; wait (nsn_space) and call again. -EALREADY: an own change of interest is not settled yet: wait for
 * nsn_interest_settled, call again. -EINVAL: subject or reply too long. -EMSGSIZE: headers + payload above 72 MiB (max_payload
 * is the caller's to check). -ENOBUFS: budget exhausted and nothing to wait for, or DETACHED and pending_size reached.
 * -ECHILD: the session belongs to the parent of this process. */
int nsn_publish(struct nsn_session *session, const char *subject, size_t subject_length, const char *reply, size_t reply_length,
                const uint8_t *headers, size_t header_length, const uint8_t *payload, size_t payload_length);
/* After -EAGAIN past the write deadline: the links that were full are given up as slow consumers. Returns how many. */
int nsn_publish_give_up(struct nsn_session *session);

/* For who has published or received a message and cannot do with it what it should: it is lost, and counted as dropped. */
void nsn_session_count_dropped(struct nsn_session *session);

/* Zero copy: a buffer of the pool; written by the caller; given away by nsn_publish_buffer or nsn_buffer_drop. */
struct nsn_buffer_out { void *block; uint8_t *data; uint64_t capacity; };
int nsn_buffer_take(struct nsn_session *session, uint64_t size, struct nsn_buffer_out *buffer);
void nsn_buffer_drop(struct nsn_session *session, struct nsn_buffer_out *buffer);
/* As nsn_publish, with `length` bytes of the buffer as payload. The buffer is consumed unless the result is negative. */
int nsn_publish_buffer(struct nsn_session *session, const char *subject, size_t subject_length, const char *reply,
                       size_t reply_length, struct nsn_buffer_out *buffer, uint64_t length);

/* As nsn_publish, for who decides about reliability message by message and asks what became of it. */
struct nsn_emission {
    const char *subject;
    size_t subject_length;
    const uint8_t *payload;       /* ignored when there is a buffer */
    struct nsn_buffer_out *buffer; /* or NULL. Consumed unless the result is negative */
    uint64_t length;              /* of the payload */
    int unreliable;               /* a full link drops, counted */
    uint32_t dropped;             /* set: how many subscriptions lost it, of those that the result counts */
};
int nsn_emit(struct nsn_session *session, struct nsn_emission *emission);

/* --- receive ----------------------------------------------------------------------------------------------------- */
struct nsn_message {              /* eight words, so that a batch can be read as one array of uint32_t */
    uint32_t sid;
    uint32_t flags;               /* NSN_MESSAGE_* */
    uint32_t offset;              /* in the blob: subject, reply, then headers and payload unless LARGE */
    uint32_t subject_length;
    uint32_t reply_length;
    uint32_t header_length;
    uint32_t payload_length;
    uint32_t large;               /* LARGE: handle for nsn_large(); held once for each message that carries it */
};
enum nsn_message_flags {
    NSN_MESSAGE_LARGE = 1,
    NSN_MESSAGE_LAST = 2,         /* the subscription's maximum is reached: it is removed */
};

/* Takes up to `most` messages, or 512 KiB of payloads, whose small parts fit into blob. Subscriptions of one record each get a
 * message (they share an offset). Returns how many; 0: nothing there. spin_ns: when there is nothing, spins that long for
 * something, but never with messages held back, and returns earlier when nsnd or an event wants attention. -EINVAL: most must
 * be 64 at least, and blob_size 64 KiB. */
int nsn_receive(struct nsn_session *session, struct nsn_message *messages, int most, uint8_t *blob, size_t blob_size,
                uint64_t spin_ns);
/* Where a large message's headers and payload lie (headers first), read-only, until it is released. NULL: unknown. */
const uint8_t *nsn_large(struct nsn_session *session, uint32_t large);
void nsn_large_release(struct nsn_session *session, uint32_t large);
/* 1 when messages were held back for causal order, or wait to be passed on to another member of a queue group (call receive
 * again soon, without sleeping long). */
int nsn_receive_held(struct nsn_session *session);
/* 1 when some publisher of this session waits for space that may be there now (clears it). */
int nsn_space(struct nsn_session *session);

/* --- sleep ------------------------------------------------------------------------------------------------------- */
/* Says asleep and looks once more. 1: asleep, block on the bell (and control) descriptor. 0: something is there, awake. */
int nsn_arm(struct nsn_session *session);
/* Awake again; takes the bell's rings. Cheap when it was awake. */
void nsn_disarm(struct nsn_session *session);
/* Arms, and blocks on the bell and control descriptors for at most timeout_ns. 1 when rung or due, 0 at the timeout. */
int nsn_doze(struct nsn_session *session, uint64_t timeout_ns);
/* Gives idle memory back: links, pool. Call about a second after the last traffic. 1 when there may be more to give. */
int nsn_trim(struct nsn_session *session);

/* --- barrier (flush, drain) -------------------------------------------------------------------------------------- */
/* Begins: when done, every change of interest made before is in the log, every link made before is with nsnd or taken, every
 * publisher has been seen outside a publish since (only when interest was removed), and what lay in this session's links
 * then has been received. Returns a token > 0. */
int nsn_barrier_begin(struct nsn_session *session);
/* 1 done (and forgotten), 0 not yet, -ENOENT unknown token. */
int nsn_barrier_done(struct nsn_session *session, int token);
void nsn_barrier_cancel(struct nsn_session *session, int token);
/* 1 when every living consumer has mapped the links that this session made, and the pool segments that belong to them: what
 * was published needs nobody any more. */
int nsn_links_taken(struct nsn_session *session);

/* --- events ------------------------------------------------------------------------------------------------------ */
enum nsn_event_kind {
    NSN_EVENT_SLOW_CONSUMER = 1,  /* this session was given up: number = messages discarded and dropped */
    NSN_EVENT_GAVE_UP = 2,        /* this session gave slot up */
    NSN_EVENT_LINK_BROKEN = 3,    /* the peer in slot broke the protocol; its link was dropped */
    NSN_EVENT_INTEREST = 4,       /* nsnd refused the subscription sid: error */
    NSN_EVENT_PONG = 5,           /* number = token */
    NSN_EVENT_LAME_DUCK = 6,
    NSN_EVENT_PEER_GONE = 7,
    NSN_EVENT_MAX_REACHED = 8,    /* subscription sid was removed because its maximum was reached */
    NSN_EVENT_HELD_UP = 10,       /* a barrier waits for the publisher in slot, which is inside one publish all the time */
    NSN_EVENT_VERSIONS = 9,       /* the session in slot is interested, and shares no protocol version: it gets nothing */
};
struct nsn_event {
    uint32_t kind;
    uint32_t slot;
    uint32_t sid;
    int32_t error;
    uint64_t number;
    char text[160];
};
/* 1 and the oldest event, or 0. At most 1,024 are kept; then the oldest goes, and is counted. */
int nsn_next_event(struct nsn_session *session, struct nsn_event *event);

int nsn_ping(struct nsn_session *session, uint64_t token);
/* Copies the session's counters (nsn_slots.h, struct nsn_counters). */
struct nsn_counters;
int nsn_session_counters(struct nsn_session *session, struct nsn_counters *counters);

#endif
