/* A message: the fields of nats-py's Msg without a dictionary, its headers read when somebody asks for them. */
#include "fast.h"

PyTypeObject *fast_message_type;

static PyTypeObject *seen;

bool fast_is_message(PyObject *object)
{
    return fast_is(object, fast_message_type, &seen);
}

bool fast_looks_like_message(PyObject *object)
{
    return Py_TYPE(object) == seen || PyType_IsSubtype(Py_TYPE(object), fast_message_type);
}

static int set_headers(PyObject *self, PyObject *value, void *unused)
{
    (void)unused;
    struct fast_message *message = (struct fast_message *)self;
    PyObject *before = message->headers, *block = message->block;
    Py_XINCREF(value);
    message->headers = value;
    message->block = NULL;
    Py_XDECREF(before);
    Py_XDECREF(block);
    return 0;
}

/* The class attribute `decode` of the shim's Msg reads a block of headers. */
static PyObject *get_headers(PyObject *self, void *unused)
{
    (void)unused;
    struct fast_message *message = (struct fast_message *)self;
    if (!message->headers && message->block) {
        PyObject *headers = PyObject_CallMethod(self, "decode", "O", message->block);
        if (!headers || set_headers(self, headers, NULL))
            return NULL;
        Py_DECREF(headers);
    }
    PyObject *headers = message->headers ? message->headers : Py_None;
    Py_INCREF(headers);
    return headers;
}

int fast_message_traverse(PyObject *self, visitproc visit, void *arg)
{
    struct fast_message *message = (struct fast_message *)self;
    Py_VISIT(message->client);
    Py_VISIT(message->data);
    Py_VISIT(message->headers);
    Py_VISIT(message->metadata);
    return 0;
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    struct fast_message *message = (struct fast_message *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(message->subject); /* a program may put anything into these */
    Py_VISIT(message->reply);
    Py_VISIT(message->sid);
    return fast_message_traverse(self, visit, arg);
}

static int clear(PyObject *self)
{
    struct fast_message *message = (struct fast_message *)self;
    Py_CLEAR(message->client);
    Py_CLEAR(message->subject);
    Py_CLEAR(message->reply);
    Py_CLEAR(message->data);
    Py_CLEAR(message->sid);
    Py_CLEAR(message->metadata);
    Py_CLEAR(message->headers);
    Py_CLEAR(message->block);
    return 0;
}

static void dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear(self);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyMemberDef members[] = {
    {"_client", T_OBJECT, offsetof(struct fast_message, client), 0, "The connection that it came by."},
    {"subject", T_OBJECT, offsetof(struct fast_message, subject), 0, "The subject that it was published to."},
    {"reply", T_OBJECT, offsetof(struct fast_message, reply), 0, "Where an answer goes, or \"\"."},
    {"data", T_OBJECT, offsetof(struct fast_message, data), 0, "The payload."},
    {"_sid", T_OBJECT, offsetof(struct fast_message, sid), 0, "The number of its subscription."},
    {"_metadata", T_OBJECT, offsetof(struct fast_message, metadata), 0, "Of JetStream, once it was read."},
    {"_ackd", T_BOOL, offsetof(struct fast_message, acknowledged), 0, "Acknowledged to JetStream."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"headers", get_headers, set_headers, "The headers, or None.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "The fields of a message."},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_members, members},
    {Py_tp_getset, properties},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "insane_nats._fast.Message",
    .basicsize = sizeof(struct fast_message),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int fast_add_message(PyObject *module)
{
    fast_message_type = fast_add_type(module, &spec);
    return fast_message_type ? 0 : -1;
}
