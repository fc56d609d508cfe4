/* The extension module insane_nats._fast: what Python programs pay for with every message, in C.
 *
 *   ring.c          a queue of messages
 *   message.c       a message, the base of the shim's Msg
 *   call.c          what `await` sees of a call that mostly needs no event loop
 *   connection.c    one connection's session; takes messages and gives them to subscriptions
 *   publish.c       connection.publish()
 *   lend.c          memory of the fabric that the program reads or writes in place
 *   subscription.c  what delivery knows of a subscription; next_msg() and iteration
 *
 * All of it is called with the GIL, which guards what it keeps. Whatever is not the plain case goes to a method in Python that
 * does the whole of it; those are named here as `slow`. */
#ifndef INSANE_NATS_FAST_H
#define INSANE_NATS_FAST_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <stdbool.h>
#include <stdint.h>

#include "nsn_session.h"

#define NATS_CONNECTED 1 /* nats-py's Client.CONNECTED */
#define NATS_CLOSED 2    /* and Client.CLOSED */

/* --- types, made once by the module ------------------------------------------------------------------------------- */

extern PyTypeObject *fast_ring_type, *fast_message_type, *fast_call_type, *fast_connection_type, *fast_queue_type,
    *fast_subscription_type, *fast_iterator_type, *fast_loan_type, *fast_block_type, *fast_lender_type;

enum { FAST_ALONE = 1 << 16 }; /* bytes of a payload that is copied without the GIL */

/* Python has these, too, by their names without FAST_. */
#define FAST_BATCH 512             /* messages taken at once, at most */
#define FAST_YIELD_S 0.002         /* publish() lets the event loop go round at least this often, */
#define FAST_YIELD_BYTES (2 << 20) /* and once in so many bytes */

/* Names of attributes and methods, interned. */
#define FAST_NAMES(X)                                                                                                          \
    X(_status) X(_removed) X(_subs) X(stats) X(out_msgs) X(out_bytes) X(in_msgs) X(in_bytes) X(wake_one) X(settle)             \
    X(_publish_slowly) X(_publish_rest) X(_no_responders) X(_start_trim) X(_drop_interest) X(_deliver_slowly) X(_too_slow)     \
    X(_next_slowly) X(subject) X(payload) X(reply) X(headers) X(timeout) X(throw) X(close) X(done) X(set_result)               \
    X(msg_class) X(_cancel)
#define FAST_DECLARE(name) extern PyObject *fast_name_##name;
FAST_NAMES(FAST_DECLARE)
#undef FAST_DECLARE

/* Whether an object is of the type or of a subclass. `seen` keeps the first subclass that was met: mostly there is no other. It
 * is never let go, which would run code here. */
static inline bool fast_is(PyObject *object, PyTypeObject *type, PyTypeObject **seen)
{
    PyTypeObject *its = Py_TYPE(object);
    if (its == *seen)
        return true;
    if (!PyType_IsSubtype(its, type))
        return false;
    if (!*seen) {
        Py_INCREF((PyObject *)its);
        *seen = its;
    }
    return true;
}
bool fast_is_message(PyObject *object);
bool fast_looks_like_message(PyObject *object); /* the same for the collector: no reference is taken */

/* Calls owner.name(a, b) for its effect; the arguments end with the first NULL. -1 with an exception. */
int fast_call_method(PyObject *owner, PyObject *name, PyObject *a, PyObject *b);

/* Each adds its type to the module; -1 with an exception. */
int fast_add_ring(PyObject *module);
int fast_add_message(PyObject *module);
int fast_add_call(PyObject *module);
int fast_add_connection(PyObject *module);
int fast_add_subscription(PyObject *module);
int fast_add_lend(PyObject *module);
/* A type made from the spec, under its name in the module; NULL with an exception. */
PyTypeObject *fast_add_type(PyObject *module, PyType_Spec *spec);

/* --- ring.c ------------------------------------------------------------------------------------------------------- */

struct fast_ring {
    PyObject_HEAD
    PyObject **items; /* a power of two of them, or none */
    size_t capacity, first, count;
};
struct fast_ring *fast_ring_new(void);
int fast_ring_push(struct fast_ring *ring, PyObject *item); /* takes a reference of its own; -1: no memory */
/* The same for a message that nothing else refers to: a backlog is nothing for the garbage collector to walk through again and
 * again. It is tracked again when it is taken out. */
int fast_ring_push_untracked(struct fast_ring *ring, PyObject *message);
PyObject *fast_ring_pop(struct fast_ring *ring);            /* the caller's reference; the ring must not be empty */

/* --- message.c ---------------------------------------------------------------------------------------------------- */

struct fast_message {
    PyObject_HEAD
    PyObject *client, *subject, *reply, *data, *sid, *metadata;
    PyObject *headers; /* a dict or None; NULL: to be read from the block, if there is one */
    PyObject *block;   /* bytes of the headers as they came */
    char acknowledged;
};
/* Visits what a message that delivery has made refers to; its type is left out. */
int fast_message_traverse(PyObject *message, visitproc visit, void *arg);

/* --- call.c ------------------------------------------------------------------------------------------------------- */

struct fast_call;
enum fast_step {
    FAST_FAILED,   /* an exception is set */
    FAST_DONE,     /* the result is there */
    FAST_PASS,     /* the event loop goes round first; then the step is taken again */
    FAST_DELEGATE, /* call->inner, a coroutine, does the rest */
};
/* One step of the call, without waiting. */
typedef enum fast_step (*fast_run)(struct fast_call *call, PyObject **result);

enum { FAST_ARGUMENTS = 4 };
struct fast_call {
    PyObject_HEAD
    fast_run run;
    const char *name; /* Class.method, for tasks and for the warning when nobody awaits it */
    PyObject *owner;
    PyObject *argument[FAST_ARGUMENTS];
    PyObject *inner;
    char started, running, passed, finished;
};
/* Takes references of its own to the owner and to each argument, which may be NULL. */
PyObject *fast_call_new(fast_run run, const char *name, PyObject *owner, PyObject *const argument[FAST_ARGUMENTS]);
/* The coroutine that owner.name(arguments…) makes is to do the rest. The arguments end with the first NULL. */
enum fast_step fast_delegate(struct fast_call *call, PyObject *owner, PyObject *name, PyObject *a, PyObject *b, PyObject *c,
                             PyObject *d);

/* --- connection.c ------------------------------------------------------------------------------------------------- */

struct fast_connection {
    PyObject_HEAD
    struct nsn_session *session; /* NULL: closed */
    struct fast_lender *lender;
    PyObject *client;
    PyObject *attributes;        /* client.__dict__ */
    PyObject *message_type;      /* a subclass of struct fast_message's type and of nats-py's Msg */
    PyObject *plain_class;       /* what the client's msg_class is when messages are to be of that type */
    long long max_payload;
    int waiting;                 /* publishers that wait for room */
    char trimming;               /* a timer gives idle memory back */
    char pedantic;
    char plain;                  /* the client has no delivery of its own */
    char receiving;              /* messages and blob are in use */
    unsigned publishes, pops;
    long long burst;             /* bytes published since the event loop went round */
    double yield_at;             /* seconds of the monotonic clock: publish() lets the loop go round then */
    double last_pass;            /* when the loop last went round */
    PyObject *last_subject;      /* of the message made last: a str, and its bytes */
    char *last_bytes;
    size_t last_length, last_room;
    struct nsn_message *messages;
    uint8_t *blob;
};
double fast_now(void); /* seconds of the monotonic clock */
/* nats-py's status number, -1 with an exception. */
long fast_status(const struct fast_connection *connection);
/* The client's counters, a new reference; NULL with an exception. */
PyObject *fast_stats(const struct fast_connection *connection);
/* Adds to one of them. */
int fast_count(PyObject *stats, PyObject *name, long long more);
PyObject *fast_publish(PyObject *self, PyObject *const *arguments, Py_ssize_t count, PyObject *names);
PyObject *fast_post(PyObject *self, PyObject *const *arguments, Py_ssize_t count);

/* --- lend.c ------------------------------------------------------------------------------------------------------- */

/* A session's memory in the program's hands. It outlives the connection, which it knows nothing of. */
struct fast_lender {
    PyObject_HEAD
    struct nsn_session *session;
    PyObject *keeper;        /* what the session lives by: it ends with its last reference, or when somebody ends it */
    Py_ssize_t lent;         /* loans and blocks that are not back, and calls that are in the session now */
    PyObject *when_returned; /* called when the last of them is back, or NULL */
};
struct fast_lender *fast_lender_new(struct nsn_session *session, PyObject *keeper);
/* Between the two the session is there, whatever is called or runs meanwhile. */
static inline void fast_enter(struct fast_lender *lender) { lender->lent++; }
void fast_leave(struct fast_lender *lender);

/* A read-only memoryview of a large message where it lies, which holds it from now on. NULL: it was given back. */
PyObject *fast_lend(struct fast_connection *connection, uint32_t large, const uint8_t *data, size_t size);
PyObject *fast_borrow(PyObject *self, PyObject *size);
PyObject *fast_emit(PyObject *self, PyObject *const *arguments, Py_ssize_t count);

/* --- subscription.c ----------------------------------------------------------------------------------------------- */

struct fast_queue {
    PyObject_HEAD
    struct fast_ring *ring;
    Py_ssize_t maxsize; /* 0: none */
    PyObject *getters;  /* a list of futures */
    PyObject *joiners;  /* a list of futures */
};
struct fast_subscription {
    PyObject_HEAD
    long long received, max_msgs, pending_size, pending_bytes_limit;
    PyObject *queue;      /* a struct fast_queue, unless somebody has put in another */
    PyObject *connection; /* a struct fast_connection, or NULL */
    PyObject *jsi, *sink; /* None, or what messages go to instead */
    char zero_copy;       /* payloads are lent, not copied */
};
/* The subscription's queue, NULL when it is not one of ours (no exception). */
struct fast_queue *fast_queue_of(const struct fast_subscription *subscription);

#endif
