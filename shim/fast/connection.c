/* One connection's session, and delivery: what lies in its links becomes messages in the queues of its subscriptions. */
#include "fast.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "nsn_copy.h"

PyTypeObject *fast_connection_type;

enum {
    BLOB_SIZE = 1 << 20,  /* bytes of their small parts */
};

double fast_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

long fast_status(const struct fast_connection *connection)
{
    PyObject *status = PyDict_GetItemWithError(connection->attributes, fast_name__status);
    return status ? PyLong_AsLong(status) : -1;
}

PyObject *fast_stats(const struct fast_connection *connection)
{
    PyObject *stats = PyDict_GetItemWithError(connection->attributes, fast_name_stats);
    if (!stats && !PyErr_Occurred())
        return PyObject_GetAttr(connection->client, fast_name_stats);
    Py_XINCREF(stats);
    return stats;
}

int fast_count(PyObject *stats, PyObject *name, long long more)
{
    PyObject *before = PyObject_GetItem(stats, name), *by = PyLong_FromLongLong(more);
    PyObject *after = before && by ? PyNumber_Add(before, by) : NULL;
    int result = after ? PyObject_SetItem(stats, name, after) : -1;
    Py_XDECREF(before);
    Py_XDECREF(by);
    Py_XDECREF(after);
    return result;
}

/* --- delivery ----------------------------------------------------------------------------------------------------- */

/* One batch on its way to the subscriptions. */
struct delivery {
    struct fast_connection *connection;
    PyObject *client;
    PyObject *subs;                         /* sid -> subscription */
    struct fast_subscription *subscription; /* of the message before, or NULL when it has none of ours */
    PyObject *object;                       /* the same, whatever it is; NULL: there is none */
    PyObject *number;                       /* its sid */
    uint32_t sid;
    bool known;                             /* sid, number and object are valid */
    bool plain;                             /* messages are made here, and go to their subscriptions directly */
};

static void forget_subscription(struct delivery *d)
{
    Py_CLEAR(d->object);
    Py_CLEAR(d->number);
    d->subscription = NULL;
    d->known = false;
}

static int find_subscription(struct delivery *d, uint32_t sid)
{
    if (d->known && d->sid == sid)
        return 0;
    forget_subscription(d);
    d->number = PyLong_FromUnsignedLong(sid);
    if (!d->number)
        return -1;
    d->object = PyDict_GetItemWithError(d->subs, d->number);
    if (!d->object && PyErr_Occurred())
        return -1;
    Py_XINCREF(d->object);
    static PyTypeObject *seen;
    if (d->object && fast_is(d->object, fast_subscription_type, &seen))
        d->subscription = (struct fast_subscription *)d->object;
    d->sid = sid;
    d->known = true;
    return 0;
}

static PyObject *text(const uint8_t *bytes, size_t length)
{
    return PyUnicode_DecodeUTF8((const char *)bytes, (Py_ssize_t)length, "surrogateescape");
}

/* The subject as text: mostly that of the message before. A new reference. */
static PyObject *subject_of(struct fast_connection *connection, const uint8_t *bytes, size_t length)
{
    if (!connection->last_subject || connection->last_length != length ||
        memcmp(connection->last_bytes, bytes, length) != 0) {
        PyObject *subject = text(bytes, length);
        if (!subject)
            return NULL;
        if (connection->last_room < length) {
            char *room = PyMem_Realloc(connection->last_bytes, length);
            if (!room) {
                PyErr_Clear();
                return subject; /* it is not kept, and that is all */
            }
            connection->last_bytes = room;
            connection->last_room = length;
        }
        memcpy(connection->last_bytes, bytes, length);
        connection->last_length = length;
        Py_XDECREF(connection->last_subject);
        connection->last_subject = subject;
    }
    Py_INCREF(connection->last_subject);
    return connection->last_subject;
}

/* A message's parts, in the blob or in its publisher's memory. */
struct parts {
    const uint8_t *subject, *reply, *headers, *payload;
    const struct nsn_message *record;
};

static PyObject *bytes_of(const uint8_t *from, size_t length)
{
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    if (!bytes)
        return NULL;
    char *to = PyBytes_AsString(bytes);
    if (length >= FAST_ALONE) {
        Py_BEGIN_ALLOW_THREADS
        nsn_copy_large(to, from, length);
        Py_END_ALLOW_THREADS
    } else {
        memcpy(to, from, length);
    }
    return bytes;
}

static PyObject *make_message(struct delivery *d, const struct parts *parts, PyObject *data)
{
    struct fast_connection *connection = d->connection;
    PyTypeObject *type = (PyTypeObject *)connection->message_type;
    struct fast_message *message = (struct fast_message *)PyType_GenericAlloc(type, 0);
    if (!message)
        return NULL;
    Py_INCREF(d->client);
    message->client = d->client;
    Py_INCREF(data);
    message->data = data;
    Py_INCREF(d->number);
    message->sid = d->number;
    message->subject = subject_of(connection, parts->subject, parts->record->subject_length);
    message->reply = text(parts->reply, parts->record->reply_length);
    if (parts->record->header_length)
        message->block = bytes_of(parts->headers, parts->record->header_length);
    if (!message->subject || !message->reply || (parts->record->header_length && !message->block)) {
        Py_DECREF(message);
        return NULL;
    }
    return (PyObject *)message;
}

/* By way of Python: a subscription of JetStream's, or a client with a delivery of its own. */
static int deliver_slowly(struct delivery *d, const struct parts *parts, PyObject *data)
{
    const struct nsn_message *record = parts->record;
    PyObject *subject = bytes_of(parts->subject, record->subject_length), *reply = bytes_of(parts->reply, record->reply_length);
    PyObject *headers = bytes_of(parts->headers, record->header_length), *result = NULL;
    if (subject && reply && headers)
        result = PyObject_CallMethodObjArgs(d->client, fast_name__deliver_slowly, d->object, d->number, subject, reply, headers,
                                            data, record->flags & NSN_MESSAGE_LAST ? Py_True : Py_False, NULL);
    Py_XDECREF(subject);
    Py_XDECREF(reply);
    Py_XDECREF(headers);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* The subscription has had its maximum: nats-py forgets it here; libnsn has, when it counted as far. */
static int end_subscription(struct delivery *d, bool last)
{
    if (PyDict_GetItemWithError(d->subs, d->number) && PyDict_DelItem(d->subs, d->number))
        return -1;
    if (PyErr_Occurred())
        return -1;
    return last ? 0 : fast_call_method(d->client, fast_name__drop_interest, d->number, NULL);
}

/* PendingQueue.wake_one(): the first of those who wait for a message. -1 with an exception. */
static int wake_one(PyObject *getters)
{
    while (PyList_Size(getters) > 0) {
        PyObject *getter = PyList_GetItem(getters, 0);
        Py_INCREF(getter);
        PyObject *done = PyList_SetSlice(getters, 0, 1, NULL) ? NULL : PyObject_CallMethodObjArgs(getter, fast_name_done, NULL);
        int result = !done ? -1 : done == Py_True ? 1 : fast_call_method(getter, fast_name_set_result, Py_None, NULL);
        Py_XDECREF(done);
        Py_DECREF(getter);
        if (result <= 0)
            return result;
    }
    return 0;
}

static int enqueue(struct delivery *d, struct fast_subscription *subscription, PyObject *message, Py_ssize_t size)
{
    struct fast_queue *queue = fast_queue_of(subscription);
    if (!queue) {
        PyErr_SetString(PyExc_TypeError, "the queue of a subscription was replaced by one of another kind");
        return -1;
    }
    long long pending = subscription->pending_size + size;
    if ((subscription->pending_bytes_limit > 0 && pending >= subscription->pending_bytes_limit) ||
        (queue->maxsize > 0 && (Py_ssize_t)queue->ring->count >= queue->maxsize))
        return fast_call_method(d->client, fast_name__too_slow, (PyObject *)subscription, message);
    subscription->pending_size = pending;
    if (fast_ring_push_untracked(queue->ring, message))
        return -1;
    if (!queue->getters || PyObject_Size(queue->getters) <= 0)
        return 0;
    if (!PyList_CheckExact(queue->getters))
        return fast_call_method((PyObject *)queue, fast_name_wake_one, NULL, NULL);
    PyObject *getters = queue->getters; /* what is called here may replace it */
    Py_INCREF(getters);
    int result = wake_one(getters);
    Py_DECREF(getters);
    return result;
}

static int deliver_to(struct delivery *d, const struct parts *parts, PyObject *data)
{
    struct fast_subscription *subscription = d->subscription;
    if (!subscription || !d->plain || (subscription->jsi && subscription->jsi != Py_None))
        return deliver_slowly(d, parts, data);
    bool ends = ++subscription->received >= subscription->max_msgs && subscription->max_msgs > 0;
    if (ends && end_subscription(d, parts->record->flags & NSN_MESSAGE_LAST))
        return -1;
    PyObject *message = make_message(d, parts, data);
    if (!message)
        return -1;
    int result;
    if (subscription->sink && subscription->sink != Py_None) {
        PyObject *taken = PyObject_CallFunctionObjArgs(subscription->sink, message, NULL);
        result = taken ? 0 : -1;
        Py_XDECREF(taken);
    } else {
        result = enqueue(d, subscription, message, parts->record->payload_length);
    }
    Py_DECREF(message);
    if (ends)
        forget_subscription(d);
    return result;
}

static bool is_lent(const struct delivery *d)
{
    const struct fast_subscription *subscription = d->subscription;
    return subscription && subscription->zero_copy && d->plain && (!subscription->jsi || subscription->jsi == Py_None);
}

/* The payload as the subscription gets it. *held: a large message is to be given back afterwards. */
static PyObject *data_for(struct delivery *d, const struct parts *parts, bool *held)
{
    size_t length = parts->record->payload_length;
    bool lent = is_lent(d);
    if (lent && *held) {
        *held = false;
        return fast_lend(d->connection, parts->record->large, parts->payload, length);
    }
    PyObject *bytes = bytes_of(parts->payload, length);
    if (!lent || !bytes)
        return bytes;
    PyObject *view = PyMemoryView_FromObject(bytes);
    Py_DECREF(bytes);
    return view;
}

static int deliver(struct delivery *d, const struct nsn_message *record)
{
    struct nsn_session *session = d->connection->lender->session;
    if (find_subscription(d, record->sid))
        return -1;
    const uint8_t *at = d->connection->blob + record->offset;
    struct parts parts = {.record = record, .subject = at, .reply = at + record->subject_length};
    parts.headers = parts.reply + record->reply_length;
    bool held = record->flags & NSN_MESSAGE_LARGE;
    int result = 0;
    if (held) {
        parts.headers = nsn_large(session, record->large);
        if (!parts.headers) {
            PyErr_SetString(PyExc_SystemError, "a large message is not where it should be");
            return -1;
        }
    }
    parts.payload = parts.headers + record->header_length;
    if (d->object) {
        PyObject *data = data_for(d, &parts, &held);
        result = data ? deliver_to(d, &parts, data) : -1;
        Py_XDECREF(data);
    }
    if (held)
        nsn_large_release(session, record->large);
    if (record->flags & NSN_MESSAGE_LAST) {
        forget_subscription(d);
        if (d->connection->attributes && PyDict_SetItem(d->connection->attributes, fast_name__removed, Py_True))
            return -1;
    }
    return result;
}

/* What goes wrong with one message must not cost the others: it is reported as what a callback raises without a handler. */
static long long deliver_all(struct fast_connection *connection, int count)
{
    struct delivery d = {.connection = connection, .client = connection->client};
    long long bytes = 0;
    Py_INCREF(d.client);
    d.subs = PyDict_GetItemWithError(connection->attributes, fast_name__subs);
    if (!d.subs || !PyDict_Check(d.subs)) {
        PyErr_SetString(PyExc_TypeError, "the client's subscriptions are no dict");
        Py_DECREF(d.client);
        return -1;
    }
    Py_INCREF(d.subs);
    if (connection->plain) {
        PyObject *class = PyObject_GetAttr(d.client, fast_name_msg_class);
        d.plain = class && class == connection->plain_class;
        Py_XDECREF(class);
        PyErr_Clear();
    }
    for (int i = 0; i < count; i++) {
        bytes += connection->messages[i].payload_length;
        if (connection->session && deliver(&d, &connection->messages[i]))
            PyErr_WriteUnraisable(d.client);
    }
    forget_subscription(&d);
    Py_DECREF(d.subs);
    Py_DECREF(d.client);
    return bytes;
}

static int take_batch(struct fast_connection *connection, long long spin_ns)
{
    int count;
    if (spin_ns > 0) {
        struct nsn_session *session = connection->session;
        Py_BEGIN_ALLOW_THREADS
        count = nsn_receive(session, connection->messages, FAST_BATCH, connection->blob, BLOB_SIZE, (uint64_t)spin_ns);
        Py_END_ALLOW_THREADS
    } else {
        count = nsn_receive(connection->session, connection->messages, FAST_BATCH, connection->blob, BLOB_SIZE, 0);
    }
    if (count <= 0 || !connection->session)
        return count;
    PyObject *stats = fast_stats(connection);
    long long bytes = deliver_all(connection, count);
    if (!stats || bytes < 0 || fast_count(stats, fast_name_in_msgs, count) || fast_count(stats, fast_name_in_bytes, bytes))
        PyErr_WriteUnraisable((PyObject *)connection);
    Py_XDECREF(stats);
    return count;
}

/* What is called on the way may come here again: there is nothing for it then. */
static PyObject *receive(PyObject *self, PyObject *argument)
{
    struct fast_connection *connection = (struct fast_connection *)self;
    long long spin_ns = PyLong_AsLongLong(argument);
    if (spin_ns == -1 && PyErr_Occurred())
        return NULL;
    if (!connection->session)
        return PyLong_FromLong(-EBADF);
    if (connection->receiving)
        return PyLong_FromLong(0);
    connection->receiving = 1;
    fast_enter(connection->lender);
    int count = take_batch(connection, spin_ns);
    connection->receiving = 0;
    fast_leave(connection->lender);
    return PyLong_FromLong(count);
}

/* --- life --------------------------------------------------------------------------------------------------------- */

static int clear_connection(PyObject *self)
{
    struct fast_connection *connection = (struct fast_connection *)self;
    connection->session = NULL;
    Py_CLEAR(connection->client);
    Py_CLEAR(connection->attributes);
    Py_CLEAR(connection->message_type);
    Py_CLEAR(connection->plain_class);
    Py_CLEAR(connection->last_subject);
    return 0;
}

static PyObject *new_connection(PyTypeObject *type, PyObject *arguments, PyObject *names)
{
    static char *known_names[] = {"client", "session", "keeper", "message_type", "plain_class", "plain", NULL};
    PyObject *client, *keeper, *message_type, *plain_class;
    unsigned long long session;
    int plain;
    if (!PyArg_ParseTupleAndKeywords(arguments, names, "OKOO!Op", known_names, &client, &session, &keeper, &PyType_Type,
                                     &message_type, &plain_class, &plain))
        return NULL;
    if (!PyType_IsSubtype((PyTypeObject *)message_type, fast_message_type)) {
        PyErr_SetString(PyExc_TypeError, "message_type is a subclass of insane_nats._fast.Message");
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct fast_connection *connection = (struct fast_connection *)allocate(type, 0);
    if (!connection)
        return NULL;
    connection->messages = PyMem_Malloc(FAST_BATCH * sizeof *connection->messages);
    connection->blob = PyMem_Malloc(BLOB_SIZE);
    connection->attributes = PyObject_GetAttrString(client, "__dict__");
    connection->lender = fast_lender_new((struct nsn_session *)(uintptr_t)session, keeper);
    if (!connection->messages || !connection->blob || !connection->attributes || !connection->lender) {
        if (!PyErr_Occurred())
            PyErr_NoMemory();
        Py_DECREF(connection);
        return NULL;
    }
    Py_INCREF(client);
    connection->client = client;
    Py_INCREF(plain_class);
    connection->plain_class = plain_class;
    Py_INCREF(message_type);
    connection->message_type = message_type;
    connection->session = (struct nsn_session *)(uintptr_t)session;
    connection->plain = (char)plain;
    connection->last_pass = fast_now();
    return (PyObject *)connection;
}

static PyObject *close_connection(PyObject *self, PyObject *unused)
{
    (void)unused;
    ((struct fast_connection *)self)->session = NULL;
    Py_RETURN_NONE;
}

static int traverse_connection(PyObject *self, visitproc visit, void *arg)
{
    struct fast_connection *connection = (struct fast_connection *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(connection->client);
    Py_VISIT(connection->attributes);
    Py_VISIT(connection->message_type);
    Py_VISIT(connection->plain_class);
    Py_VISIT(connection->lender);
    return 0;
}

static void dealloc_connection(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    struct fast_connection *connection = (struct fast_connection *)self;
    PyObject_GC_UnTrack(self);
    clear_connection(self);
    Py_XDECREF((PyObject *)connection->lender);
    PyMem_Free(connection->last_bytes);
    PyMem_Free(connection->messages);
    PyMem_Free(connection->blob);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyMemberDef members[] = {
    {"max_payload", T_LONGLONG, offsetof(struct fast_connection, max_payload), 0, "Bytes; above, publish() goes the slow way."},
    {"waiting", T_INT, offsetof(struct fast_connection, waiting), 0,
     "Publishers that wait for room, which is first come first served."},
    {"trimming", T_BOOL, offsetof(struct fast_connection, trimming), 0, "A timer is set that gives idle memory back."},
    {"lender", T_OBJECT, offsetof(struct fast_connection, lender), READONLY, "What is in the program's hands."},
    {"pedantic", T_BOOL, offsetof(struct fast_connection, pedantic), 0, "Subjects are looked at once more, by Python."},
    {"last_pass", T_DOUBLE, offsetof(struct fast_connection, last_pass), 0,
     "Monotonic seconds: when the loop last went round."},
    {NULL, 0, 0, 0, NULL},
};

static PyMethodDef methods[] = {
    {"publish", (PyCFunction)(void (*)(void))fast_publish, METH_FASTCALL | METH_KEYWORDS,
     "publish($self, subject, payload=b'', reply='', headers=None)\n--\n\nPublishes a message. Waits while a subscriber has no "
     "room, up to the write deadline."},
    {"post", (PyCFunction)(void (*)(void))fast_post, METH_FASTCALL,
     "post($self, subject, payload, reply, /)\n--\n\nPublishes at once. False when nothing was done: "
     "publish() knows more ways."},
    {"borrow", fast_borrow, METH_O,
     "borrow($self, size, /)\n--\n\nA Block of so many bytes, or a negative errno."},
    {"emit", (PyCFunction)(void (*)(void))fast_emit, METH_FASTCALL,
     "emit($self, subject, reply, block, length, /)\n--\n\nGives the block away with a message. How many subscriptions "
     "it went to, or a negative errno: then the block is still the caller's."},
    {"receive", receive, METH_O,
     "receive($self, spin_ns, /)\n--\n\nTakes a batch and gives it to the subscriptions. Returns the number of messages, or a "
     "negative errno. When there are none it spins that long for some."},
    {"close", close_connection, METH_NOARGS,
     "close($self, /)\n--\n\nBefore the session is closed: from now on publish() goes the slow way, and nothing is received."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Connection(client, session, keeper, message_type, plain_class, plain)\n--\n\n"
                "What every message of a connection costs, in C. session: its address; it lives as long as the keeper, whose "
                "destructor ends it, or until it is ended after close() with nothing lent. message_type: of messages that are "
                "made here, which are those of a client whose msg_class is plain_class and that is plain: has no delivery of "
                "its own."},
    {Py_tp_new, new_connection},
    {Py_tp_dealloc, dealloc_connection},
    {Py_tp_traverse, traverse_connection},
    {Py_tp_clear, clear_connection},
    {Py_tp_members, members},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "insane_nats._fast.Connection",
    .basicsize = sizeof(struct fast_connection),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int fast_add_connection(PyObject *module)
{
    fast_connection_type = fast_add_type(module, &spec);
    return fast_connection_type ? 0 : -1;
}
