/* What the nsn_insane_*.c files share: INSANE's streams, sources, sinks and buffers on one session. */
#ifndef NSN_INSANE_INTERNAL_H
#define NSN_INSANE_INTERNAL_H

#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "nsn/nsn.h"
#include "nsn_insane.h"
#include "nsn_session.h"
#include "nsn_shared.h"

#define NSN_SECOND_NS 1000000000ull
#define NSN_ATTEND_NS 1000000ull      /* how often nsnd is looked after by who does not sleep */
#define NSN_INSANE_WORDS 512

/* --- words of errors (nsn_insane_words.c) ------------------------------------------------------------------------- */

/* Keeps the words for this thread, sets errno, returns error (a negative errno). */
int nsn_insane_fail(int error, const char *format, ...) __attribute__((format(printf, 2, 3), cold));

enum nsn_log_level { NSN_LOG_NONE = 0, NSN_LOG_ERROR = 1, NSN_LOG_WARN = 2 };

/* --- the node (nsn_insane_node.c) --------------------------------------------------------------------------------- */

struct nsn_node {
    char socket[256];             /* its control socket */
    uint64_t uid, pid;
};

/* Asks who serves the application ID on this host, and starts an nsnd where nobody does and that is allowed. 0, or a
 * negative errno with words. */
int nsn_node_find(uint32_t application_id, char *const *command, struct nsn_node *node);
/* What an INFO line says of the node. 0; -ENOENT: it has no "insane" part; -EPROTO: no INFO, or none that can be read. */
int nsn_node_parse(const char *line, size_t length, struct nsn_node *node);

/* --- short sections ----------------------------------------------------------------------------------------------- */

/* A lock for a few instructions: half the price of a mutex where nobody contends. */
struct nsn_latch { uint32_t taken; };
void nsn_latch_wait(struct nsn_latch *latch);

static inline void nsn_latch_take(struct nsn_latch *latch)
{
    if (__atomic_exchange_n(&latch->taken, 1, __ATOMIC_ACQUIRE)) /* pairs with nsn_latch_give() */
        nsn_latch_wait(latch);
}

static inline void nsn_latch_give(struct nsn_latch *latch) { __atomic_store_n(&latch->taken, 0, __ATOMIC_RELEASE); }

/* --- buffers (nsn_insane_buffers.c) ------------------------------------------------------------------------------- */

/* Where the small parts of received messages lie: filled from the front, used again when every message of it is released. */
#define NSN_CHUNK_BYTES (128u << 10)
#define NSN_RECEIVE_BYTES (64u << 10) /* what nsn_receive needs */

#define NSN_CHUNK_OPEN (1u << 31)

struct nsn_chunk {
    struct nsn_chunk *next;
    uint32_t used;
    uint32_t lent;                /* messages put into it */
    uint32_t references;          /* of them that are out; NSN_CHUNK_OPEN less what came back while it is being filled */
    uint8_t bytes[NSN_CHUNK_BYTES];
};

enum nsn_loan_kind {
    NSN_LOAN_OWN = 0,             /* got, small: memory of this process, which stays with the loan */
    NSN_LOAN_BLOCK = 1,           /* got, large: a block of the session's pool */
    NSN_LOAN_CHUNK = 2,           /* consumed, small */
    NSN_LOAN_LARGE = 3,           /* consumed, large: read in place */
};

/* A buffer that is out. Loans are never given back to the system, so that a program's stale pointer still points to one. */
struct nsn_loan {
    nsn_buffer_t buffer;          /* what the program has */
    struct nsn_insane *owner;     /* NULL: it is free */
    uint8_t *data;
    uint64_t capacity;
    struct nsn_loan *next;        /* of a free list, or a sink's queue */
    uint32_t number, generation;  /* number stays; generation is raised when it comes back */
    uint8_t kind;
    uint8_t size_class;           /* of its own memory; the last: it has none */
    uint32_t large;
    struct nsn_chunk *chunk;
    struct nsn_buffer_out block;
};

/* A free loan; with memory of its own of at least size bytes, or none (UINT64_MAX). NULL: no memory. */
struct nsn_loan *nsn_loan_take(struct nsn_insane *insane, uint64_t size);
/* Back to its free list; what it carries has been seen to. */
void nsn_loan_give(struct nsn_loan *loan);
/* The loan behind a program's buffer, or NULL: it is none of this session's that is out. */
struct nsn_loan *nsn_loan_find(struct nsn_insane *insane, const nsn_buffer_t *buffer);
/* Gives what it carries back to the fabric, and then the loan itself. */
void nsn_loan_release(struct nsn_insane *insane, struct nsn_loan *loan);
/* All of a session that ends. */
void nsn_loans_forget(struct nsn_insane *insane);

struct nsn_chunk *nsn_chunk_fill(struct nsn_insane *insane);
void nsn_chunk_drop(struct nsn_insane *insane, struct nsn_chunk *chunk);

/* --- handles (nsn_insane_things.c) -------------------------------------------------------------------------------- */

#define NSN_THINGS_MAX 65535u
#define NSN_OUTCOMES 256u
#define NSN_SINK_MESSAGES 65536u        /* kept for a sink that is not consumed from while others are */
#define NSN_SINK_BYTES (64ull << 20)

struct nsn_stream {
    nsn_options_t options;
};

struct nsn_source {
    uint32_t stream;
    char subject[24];
    uint8_t subject_length, unreliable;
    uint32_t next_token;
    uint64_t outcomes[NSN_OUTCOMES]; /* token in the upper half, outcome in the lower; 0 none */
};

struct nsn_sink {
    uint32_t stream, channel;
    int consumption;
    void *callback;
    bool calling, listed;         /* its callback runs; it is in the list of sinks with something for a callback */
    pthread_t caller;
    struct nsn_sink *next_ready;
    struct nsn_loan *first, **last;
    uint32_t count;
    uint64_t bytes, dropped;
    int refused;                  /* by nsnd: a negative errno */
};

/* A handle is a place in a table and its generation, so that a stale one is known. */
struct nsn_thing {
    uint32_t handle;              /* 0: free */
    uint32_t generation;
    union {
        struct nsn_stream stream;
        struct nsn_source source;
        struct nsn_sink sink;
    };
};

struct nsn_things {
    struct nsn_thing **pages;     /* never move, so that emission needs no lock to find its source */
    uint32_t used, free_count;    /* places ever used; free ones among them */
    size_t size;                  /* bytes of one thing */
};

/* A new one, zeroed but for its handle; NULL: no memory, or all are taken. */
struct nsn_thing *nsn_things_add(struct nsn_things *things);
struct nsn_thing *nsn_things_find(const struct nsn_things *things, uint32_t handle);
/* The next one in use from place *at on, or NULL. */
struct nsn_thing *nsn_things_next(const struct nsn_things *things, uint32_t *at);
void nsn_things_remove(struct nsn_things *things, struct nsn_thing *thing);
int nsn_things_init(struct nsn_things *things, size_t size);
void nsn_things_free(struct nsn_things *things);

/* --- the session -------------------------------------------------------------------------------------------------- */

struct nsn_spin {                 /* an adaptive waiter's budget: as shim/spin.py */
    uint64_t budget_ns;
    uint32_t trust, short_sleeps, hits;
};

#define NSN_BATCH 64

struct nsn_insane {
    struct nsn_session *session;
    struct nsn_insane_options options;
    struct nsn_node node;
    char *credentials;            /* JSON; NULL: none */
    uint64_t max_payload, write_deadline_ns;

    pthread_mutex_t lock;         /* all below; also around nsn_receive and the dispatch of what it took, for order */
    uint32_t contenders, turns;   /* threads that want it; how often one of them got it: for a leader that spins with it */
    struct nsn_things streams, sources, sinks;
    struct nsn_chunk *filling;    /* what nsn_receive writes into */
    struct nsn_loan *spare;       /* taken while there was nothing to do, for the message that comes next */
    struct nsn_message messages[NSN_BATCH];
    struct nsn_spin spin;

    bool leader;                  /* a thread spins or sleeps on behalf of all that wait */
    bool dozing;                  /* the leader sleeps */
    uint32_t waiters, followers;  /* threads in a call that waits; those of them that sleep in nsn_insane_follow() */
    pthread_mutex_t changed_lock; /* of the two below; taken inside the other lock */
    pthread_cond_t changed;
    uint32_t changes;             /* dispatched, the leader left, a callback returned, a sink was destroyed … */
    bool shut_down;
    int kick;                     /* eventfd that wakes the leader */
    int watch, notice;            /* epoll descriptor for an event loop; the eventfd in it; -1 */
    bool watching;

    uint64_t trim_at;             /* 0: nothing to trim */
    uint64_t attend_at;           /* when a program that consumes without waiting looks after nsnd again */
    uint64_t detached_since, attach_next, start_next; /* 0: attached */
    uint64_t attach_wait_ns;
    char detached_words[NSN_INSANE_WORDS];

    pthread_t caller;             /* of callbacks */
    bool calling, caller_ends;
    struct nsn_sink *ready, **ready_last; /* sinks with a callback and something for it */

    struct nsn_latch chunk_latch;
    struct nsn_chunk *free_chunks;
    uint32_t free_chunk_count;

    char warning[NSN_INSANE_WORDS];
    uint32_t warned;              /* bit a kind: once is enough */
};

/* --- credentials (nsn_insane_credentials.c) ----------------------------------------------------------------------- */

/* Makes them of the options. 0, or a negative errno with words. */
int nsn_insane_introduce(struct nsn_insane *insane);
void nsn_insane_forget_credentials(struct nsn_insane *insane);
/* When nsnd asks who this is, says so. */
void nsn_insane_answer(struct nsn_insane *insane);
bool nsn_insane_is_relayed(struct nsn_insane *insane);

void nsn_insane_lock(struct nsn_insane *insane);
static inline void nsn_insane_unlock(struct nsn_insane *insane) { pthread_mutex_unlock(&insane->lock); }

/* All with the lock held. */
/* Reads what nsnd and the session have to say, and attaches again when nsnd was gone. wait: the caller has time. */
void nsn_insane_attend(struct nsn_insane *insane, bool wait);
/* Receives once, and puts what came into the sinks' queues. Returns how many. leading: the caller is the leader. */
int nsn_insane_take(struct nsn_insane *insane, bool leading);
/* One step of waiting, until something was dispatched, the deadline (ns) is over, or something else happened: the caller
 * looks at its condition again. 0, -EINTR, -ESHUTDOWN, -ENOTCONN (since: when the call began). */
int nsn_insane_wait(struct nsn_insane *insane, int consumption, uint64_t deadline_ns, uint64_t since);
/* Sleeps until somebody says nsn_insane_wake_all(), or the deadline, or a moment has passed. */
void nsn_insane_follow(struct nsn_insane *insane, uint64_t deadline_ns);
/* Something changed that whoever waits should see. */
void nsn_insane_wake_all(struct nsn_insane *insane);
void nsn_insane_warn(struct nsn_insane *insane, uint32_t kind, const char *format, ...) __attribute__((format(printf, 3, 4)));
int nsn_insane_check(struct nsn_insane *insane);
/* Subscribes a sink's channel (again). */
int nsn_sink_subscribe(struct nsn_insane *insane, const struct nsn_thing *sink);
void nsn_sink_empty(struct nsn_insane *insane, struct nsn_sink *sink);
int nsn_callbacks_start(struct nsn_insane *insane);
void nsn_callbacks_end(struct nsn_insane *insane);

#endif
