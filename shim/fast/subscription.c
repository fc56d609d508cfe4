/* What delivery knows of a subscription and of its queue, and the ways of taking messages that need not wait: next_msg() and
 * iteration. Waiting is done by the coroutine methods _next_slowly(timeout) of the subscription and of its iterator. */
#include "fast.h"

PyTypeObject *fast_queue_type, *fast_subscription_type, *fast_iterator_type;

#define PASS_S 0.001 /* who takes messages that are queued lets the event loop go round at least this often */
enum { CLOCK_EVERY = 64 };

/* --- queue -------------------------------------------------------------------------------------------------------- */

struct fast_queue *fast_queue_of(const struct fast_subscription *subscription)
{
    static PyTypeObject *seen;
    PyObject *queue = subscription->queue;
    return queue && fast_is(queue, fast_queue_type, &seen) ? (struct fast_queue *)queue : NULL;
}

static PyObject *new_queue(PyTypeObject *type, PyObject *arguments, PyObject *names)
{
    (void)arguments, (void)names;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct fast_queue *queue = (struct fast_queue *)allocate(type, 0);
    if (!queue)
        return NULL;
    queue->ring = fast_ring_new();
    if (!queue->ring) {
        Py_DECREF(queue);
        return NULL;
    }
    return (PyObject *)queue;
}

static int traverse_queue(PyObject *self, visitproc visit, void *arg)
{
    struct fast_queue *queue = (struct fast_queue *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(queue->ring);
    Py_VISIT(queue->getters);
    Py_VISIT(queue->joiners);
    return 0;
}

static int clear_queue(PyObject *self)
{
    struct fast_queue *queue = (struct fast_queue *)self;
    Py_CLEAR(queue->getters);
    Py_CLEAR(queue->joiners);
    return 0; /* the ring stays: it clears itself, and nobody expects a queue without */
}

static void dealloc_queue(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear_queue(self);
    Py_CLEAR(((struct fast_queue *)self)->ring);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyMemberDef queue_members[] = {
    {"_queue", T_OBJECT, offsetof(struct fast_queue, ring), READONLY, "What is queued."},
    {"_maxsize", T_PYSSIZET, offsetof(struct fast_queue, maxsize), 0, "Most items; 0: no limit."},
    {"_getters", T_OBJECT, offsetof(struct fast_queue, getters), 0, "Who waits for an item: futures, the first one first."},
    {"_joiners", T_OBJECT, offsetof(struct fast_queue, joiners), 0, "Who waits until everything is finished: futures."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot queue_slots[] = {
    {Py_tp_doc, "What delivery knows of a subscription's queue."},
    {Py_tp_new, new_queue},
    {Py_tp_dealloc, dealloc_queue},
    {Py_tp_traverse, traverse_queue},
    {Py_tp_clear, clear_queue},
    {Py_tp_members, queue_members},
    {0, NULL},
};

static PyType_Spec queue_spec = {
    .name = "insane_nats._fast.Queue",
    .basicsize = sizeof(struct fast_queue),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = queue_slots,
};

/* --- taking a message --------------------------------------------------------------------------------------------- */

static bool turn_is_due(struct fast_connection *connection)
{
    if (++connection->pops % CLOCK_EVERY)
        return false;
    double now = fast_now();
    if (now - connection->last_pass < PASS_S)
        return false;
    connection->last_pass = now;
    return true;
}

static Py_ssize_t size_of(PyObject *item)
{
    PyObject *data;
    if (fast_is_message(item)) {
        data = ((struct fast_message *)item)->data;
        return !data ? 0 : PyBytes_CheckExact(data) ? PyBytes_Size(data) : PyObject_Size(data);
    }
    data = PyObject_GetAttrString(item, "data");
    Py_ssize_t size = data ? PyObject_Size(data) : -1;
    Py_XDECREF(data);
    return size;
}

/* The first message of the queue; NULL with an exception. */
static PyObject *take(struct fast_subscription *subscription, struct fast_queue *queue)
{
    Py_INCREF((PyObject *)queue); /* what is called here may replace it */
    PyObject *message = fast_ring_pop(queue->ring);
    Py_ssize_t size = size_of(message);
    bool well = size >= 0;
    if (well) {
        subscription->pending_size -= size;
        if (queue->joiners && PyList_Check(queue->joiners) && PyList_Size(queue->joiners) > 0)
            well = fast_call_method((PyObject *)queue, fast_name_settle, NULL, NULL) == 0;
    }
    Py_DECREF((PyObject *)queue);
    if (!well)
        Py_CLEAR(message);
    return message;
}

/* Whether there is a message that may be taken now; what the connection is in says its client. */
static struct fast_queue *ready(struct fast_subscription *subscription)
{
    struct fast_connection *connection = (struct fast_connection *)subscription->connection;
    struct fast_queue *queue = fast_queue_of(subscription);
    return connection && connection->session && queue && queue->ring->count ? queue : NULL;
}

/* --- subscription ------------------------------------------------------------------------------------------------- */

static enum fast_step run_next(struct fast_call *call, PyObject **result)
{
    struct fast_subscription *subscription = (struct fast_subscription *)call->owner;
    struct fast_connection *connection = (struct fast_connection *)subscription->connection;
    struct fast_queue *queue = ready(subscription);
    if (!queue || fast_status(connection) == NATS_CLOSED)
        return fast_delegate(call, call->owner, fast_name__next_slowly, call->argument[0], NULL, NULL, NULL);
    if (!call->passed && turn_is_due(connection))
        return FAST_PASS;
    *result = take(subscription, queue);
    return *result ? FAST_DONE : FAST_FAILED;
}

static PyObject *next_msg(PyObject *self, PyObject *const *given, Py_ssize_t count, PyObject *names)
{
    PyObject *arguments[FAST_ARGUMENTS] = {count ? given[0] : NULL, NULL, NULL, NULL}, *standard = NULL;
    Py_ssize_t named = names ? PyTuple_Size(names) : 0;
    if (count + named > 1 || (named && PyUnicode_Compare(PyTuple_GetItem(names, 0), fast_name_timeout) != 0)) {
        PyErr_SetString(PyExc_TypeError, "next_msg() takes one argument: timeout");
        return NULL;
    }
    if (named)
        arguments[0] = given[0];
    if (!arguments[0])
        arguments[0] = standard = PyFloat_FromDouble(1.0);
    PyObject *call = arguments[0] ? fast_call_new(run_next, "Subscription.next_msg", self, arguments) : NULL;
    Py_XDECREF(standard);
    return call;
}

static int traverse_subscription(PyObject *self, visitproc visit, void *arg)
{
    struct fast_subscription *subscription = (struct fast_subscription *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(subscription->queue);
    Py_VISIT(subscription->connection);
    Py_VISIT(subscription->jsi);
    Py_VISIT(subscription->sink);
    return 0;
}

static int clear_subscription(PyObject *self)
{
    struct fast_subscription *subscription = (struct fast_subscription *)self;
    Py_CLEAR(subscription->queue);
    Py_CLEAR(subscription->connection);
    Py_CLEAR(subscription->jsi);
    Py_CLEAR(subscription->sink);
    return 0;
}

static void dealloc_subscription(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear_subscription(self);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyObject *get_connection(PyObject *self, void *unused)
{
    (void)unused;
    PyObject *connection = ((struct fast_subscription *)self)->connection;
    connection = connection ? connection : Py_None;
    Py_INCREF(connection);
    return connection;
}

static int set_connection(PyObject *self, PyObject *value, void *unused)
{
    (void)unused;
    struct fast_subscription *subscription = (struct fast_subscription *)self;
    if (value && value != Py_None && !PyObject_TypeCheck(value, fast_connection_type)) {
        PyErr_SetString(PyExc_TypeError, "_fast is an insane_nats._fast.Connection or None");
        return -1;
    }
    PyObject *before = subscription->connection;
    subscription->connection = value == Py_None ? NULL : value;
    Py_XINCREF(subscription->connection);
    Py_XDECREF(before);
    return 0;
}

static PyMemberDef subscription_members[] = {
    {"_received", T_LONGLONG, offsetof(struct fast_subscription, received), 0, "Messages in all."},
    {"_max_msgs", T_LONGLONG, offsetof(struct fast_subscription, max_msgs), 0, "Most of them; 0: no limit."},
    {"_pending_size", T_LONGLONG, offsetof(struct fast_subscription, pending_size), 0, "Bytes of the payloads queued."},
    {"_pending_bytes_limit", T_LONGLONG, offsetof(struct fast_subscription, pending_bytes_limit), 0,
     "Most of them; 0 or less: no limit."},
    {"_pending_queue", T_OBJECT, offsetof(struct fast_subscription, queue), 0, "What is queued."},
    {"_jsi", T_OBJECT, offsetof(struct fast_subscription, jsi), 0, "What JetStream knows of it, or None."},
    {"_sink", T_OBJECT, offsetof(struct fast_subscription, sink), 0, "What messages are given to instead, or None."},
    {"_zero_copy", T_BOOL, offsetof(struct fast_subscription, zero_copy), 0, "Payloads are views, large ones of the fabric."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef subscription_properties[] = {
    {"_fast", get_connection, set_connection, "The connection's part in C, or None.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef subscription_methods[] = {
    {"_next_quickly", (PyCFunction)(void (*)(void))next_msg, METH_FASTCALL | METH_KEYWORDS,
     "_next_quickly($self, timeout=1.0)\n--\n\nThe next message: from the queue, else by _next_slowly(timeout)."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot subscription_slots[] = {
    {Py_tp_doc, "What delivery knows of a subscription."},
    {Py_tp_dealloc, dealloc_subscription},
    {Py_tp_traverse, traverse_subscription},
    {Py_tp_clear, clear_subscription},
    {Py_tp_members, subscription_members},
    {Py_tp_getset, subscription_properties},
    {Py_tp_methods, subscription_methods},
    {0, NULL},
};

static PyType_Spec subscription_spec = {
    .name = "insane_nats._fast.Subscription",
    .basicsize = sizeof(struct fast_subscription),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = subscription_slots,
};

/* --- iterator ----------------------------------------------------------------------------------------------------- */

struct fast_iterator {
    PyObject_HEAD
    PyObject *subscription; /* a struct fast_subscription */
};

static enum fast_step run_iteration(struct fast_call *call, PyObject **result)
{
    struct fast_iterator *iterator = (struct fast_iterator *)call->owner;
    struct fast_subscription *subscription = (struct fast_subscription *)iterator->subscription;
    struct fast_queue *queue = subscription ? ready(subscription) : NULL;
    if (!queue)
        return fast_delegate(call, call->owner, fast_name__next_slowly, NULL, NULL, NULL, NULL);
    if (!call->passed && turn_is_due((struct fast_connection *)subscription->connection))
        return FAST_PASS;
    *result = take(subscription, queue);
    bool was_last = subscription->max_msgs > 0 && subscription->max_msgs <= subscription->received;
    if (*result && was_last && fast_call_method(call->owner, fast_name__cancel, NULL, NULL))
        Py_CLEAR(*result);
    return *result ? FAST_DONE : FAST_FAILED;
}

static PyObject *iterate(PyObject *self)
{
    PyObject *const none[FAST_ARGUMENTS] = {NULL, NULL, NULL, NULL};
    return fast_call_new(run_iteration, "MessageIterator.__anext__", self, none);
}

static PyObject *itself(PyObject *self)
{
    Py_INCREF(self);
    return self;
}

static PyObject *get_subscription(PyObject *self, void *unused)
{
    (void)unused;
    PyObject *subscription = ((struct fast_iterator *)self)->subscription;
    subscription = subscription ? subscription : Py_None;
    Py_INCREF(subscription);
    return subscription;
}

static int set_subscription(PyObject *self, PyObject *value, void *unused)
{
    (void)unused;
    struct fast_iterator *iterator = (struct fast_iterator *)self;
    if (!value || !PyObject_TypeCheck(value, fast_subscription_type)) {
        PyErr_SetString(PyExc_TypeError, "_sub is a subscription");
        return -1;
    }
    PyObject *before = iterator->subscription;
    Py_INCREF(value);
    iterator->subscription = value;
    Py_XDECREF(before);
    return 0;
}

static int traverse_iterator(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((struct fast_iterator *)self)->subscription);
    return 0;
}

static int clear_iterator(PyObject *self)
{
    Py_CLEAR(((struct fast_iterator *)self)->subscription);
    return 0;
}

static void dealloc_iterator(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear_iterator(self);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyGetSetDef iterator_properties[] = {
    {"_sub", get_subscription, set_subscription, "The subscription.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot iterator_slots[] = {
    {Py_tp_doc, "`async for` over a subscription's messages."},
    {Py_tp_dealloc, dealloc_iterator},
    {Py_tp_traverse, traverse_iterator},
    {Py_tp_clear, clear_iterator},
    {Py_tp_getset, iterator_properties},
    {Py_am_aiter, itself},
    {Py_am_anext, iterate},
    {0, NULL},
};

static PyType_Spec iterator_spec = {
    .name = "insane_nats._fast.Iterator",
    .basicsize = sizeof(struct fast_iterator),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = iterator_slots,
};

int fast_add_subscription(PyObject *module)
{
    fast_queue_type = fast_add_type(module, &queue_spec);
    fast_subscription_type = fast_queue_type ? fast_add_type(module, &subscription_spec) : NULL;
    fast_iterator_type = fast_subscription_type ? fast_add_type(module, &iterator_spec) : NULL;
    return fast_iterator_type ? 0 : -1;
}
