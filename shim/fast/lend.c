/* Memory of the fabric in a program's hands: a large message that is read in place (Loan), and a block of the pool that is
 * written by the program and given away with a message (Block). Whatever views it keeps it; it goes back with the last view. */
#include "fast.h"

#include <errno.h>
#include <string.h>

PyTypeObject *fast_loan_type, *fast_block_type, *fast_lender_type;

/* --- who lends ---------------------------------------------------------------------------------------------------- */

struct fast_lender *fast_lender_new(struct nsn_session *session, PyObject *keeper)
{
    struct fast_lender *lender = PyObject_GC_New(struct fast_lender, fast_lender_type);
    if (!lender)
        return NULL;
    lender->session = session;
    Py_INCREF(keeper);
    lender->keeper = keeper;
    lender->lent = 0;
    lender->when_returned = NULL;
    PyObject_GC_Track(lender);
    return lender;
}

/* A reference that something lent has to its lender. */
static struct fast_lender *lends(struct fast_lender *lender)
{
    lender->lent++;
    Py_INCREF((PyObject *)lender);
    return lender;
}

void fast_leave(struct fast_lender *lender)
{
    if (--lender->lent || !lender->when_returned)
        return;
    PyObject *kind, *value, *traceback;
    PyErr_Fetch(&kind, &value, &traceback);
    PyObject *callback = lender->when_returned;
    lender->when_returned = NULL;
    PyObject *result = PyObject_CallNoArgs(callback);
    if (!result)
        PyErr_WriteUnraisable(callback);
    Py_XDECREF(result);
    Py_DECREF(callback);
    PyErr_Restore(kind, value, traceback);
}

/* The keeper is not for the collector: finalizers and whatever is lent may still need the session. It refers to nothing. */
static int traverse_lender(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((struct fast_lender *)self)->when_returned);
    return 0;
}

static int clear_lender(PyObject *self)
{
    Py_CLEAR(((struct fast_lender *)self)->when_returned);
    return 0;
}

static void dealloc_lender(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear_lender(self);
    Py_DECREF(((struct fast_lender *)self)->keeper);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyMemberDef lender_members[] = {
    {"lent", T_PYSSIZET, offsetof(struct fast_lender, lent), READONLY, "Messages and buffers in the program's hands."},
    {"when_returned", T_OBJECT, offsetof(struct fast_lender, when_returned), 0,
     "Called when the last of them is back: the session may be closed then, and not before."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot lender_slots[] = {
    {Py_tp_doc, "A session's memory in the program's hands."},
    {Py_tp_dealloc, dealloc_lender},
    {Py_tp_traverse, traverse_lender},
    {Py_tp_clear, clear_lender},
    {Py_tp_members, lender_members},
    {0, NULL},
};

static PyType_Spec lender_spec = {
    .name = "insane_nats._fast.Lender",
    .basicsize = sizeof(struct fast_lender),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = lender_slots,
};

/* --- a message that is read in place ------------------------------------------------------------------------------ */

struct loan {
    PyObject_HEAD
    struct fast_lender *lender;
    const uint8_t *data;
    Py_ssize_t size, views;
    uint32_t large;
    char held;  /* not given back yet */
    char meant; /* somebody has said that it may go back */
};

static void give_back(struct loan *loan)
{
    if (!loan->held)
        return;
    loan->held = 0;
    nsn_large_release(loan->lender->session, loan->large);
    fast_leave(loan->lender);
}

static int view_loan(PyObject *self, Py_buffer *view, int flags)
{
    struct loan *loan = (struct loan *)self;
    if (!loan->held) {
        PyErr_SetString(PyExc_BufferError, "the message was released");
        return -1;
    }
    if (PyBuffer_FillInfo(view, self, (void *)loan->data, loan->size, 1, flags))
        return -1;
    loan->views++;
    return 0;
}

static void end_view_of_loan(PyObject *self, Py_buffer *view)
{
    (void)view; /* a memoryview takes one, whatever is made of it; others may be taken of the loan itself */
    struct loan *loan = (struct loan *)self;
    if (--loan->views)
        return;
    bool forgotten = loan->held && !loan->meant;
    give_back(loan);
    if (!forgotten)
        return;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (PyErr_WarnEx(PyExc_ResourceWarning, "a message of a zero_copy subscription was not released: it is released now", 1))
        PyErr_WriteUnraisable(self);
    PyErr_Restore(type, value, traceback);
}

static void dealloc_loan(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    struct loan *loan = (struct loan *)self;
    give_back(loan);
    Py_DECREF((PyObject *)loan->lender);
    PyObject_Free(self);
    Py_DECREF(type);
}

PyObject *fast_lend(struct fast_connection *connection, uint32_t large, const uint8_t *data, size_t size)
{
    struct loan *loan = PyObject_New(struct loan, fast_loan_type);
    if (!loan) {
        nsn_large_release(connection->lender->session, large);
        return NULL;
    }
    loan->lender = lends(connection->lender);
    loan->data = data;
    loan->size = (Py_ssize_t)size;
    loan->views = 0;
    loan->large = large;
    loan->held = 1;
    loan->meant = 0;
    PyObject *view = PyMemoryView_FromObject((PyObject *)loan);
    if (!view)
        loan->meant = 1;
    Py_DECREF((PyObject *)loan);
    return view;
}

static PyMemberDef loan_members[] = {
    {"meant", T_BOOL, offsetof(struct loan, meant), 0, "Set before its view is released on purpose: nobody is warned."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot loan_slots[] = {
    {Py_tp_doc, "A message in its publisher's memory, read-only, until its view is released."},
    {Py_tp_dealloc, dealloc_loan},
    {Py_tp_members, loan_members},
    {Py_bf_getbuffer, view_loan},
    {Py_bf_releasebuffer, end_view_of_loan},
    {0, NULL},
};

static PyType_Spec loan_spec = {
    .name = "insane_nats._fast.Loan",
    .basicsize = sizeof(struct loan),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = loan_slots,
};

/* --- a block that is written in place ----------------------------------------------------------------------------- */

struct block {
    PyObject_HEAD
    struct fast_lender *lender;
    struct nsn_buffer_out buffer; /* its block is NULL when it was given away or back */
    Py_ssize_t size, views;
};

static bool is_held(const struct block *block)
{
    return block->buffer.block != NULL;
}

static void forget_block(struct block *block)
{
    block->buffer = (struct nsn_buffer_out){NULL, NULL, 0};
    fast_leave(block->lender);
}

static int view_block(PyObject *self, Py_buffer *view, int flags)
{
    struct block *block = (struct block *)self;
    if (!is_held(block)) {
        PyErr_SetString(PyExc_ValueError, "this buffer was released or emitted: borrow another one");
        return -1;
    }
    if (PyBuffer_FillInfo(view, self, block->buffer.data, block->size, 0, flags))
        return -1;
    block->views++;
    return 0;
}

static void end_view_of_block(PyObject *self, Py_buffer *view)
{
    (void)view;
    ((struct block *)self)->views--;
}

static int check_unviewed(const struct block *block, const char *what)
{
    if (!block->views)
        return 0;
    PyErr_Format(PyExc_BufferError, "the buffer cannot be %s while a slice or an array views it: release that first", what);
    return -1;
}

static PyObject *release_block(PyObject *self, PyObject *unused)
{
    (void)unused;
    struct block *block = (struct block *)self;
    if (is_held(block)) {
        if (check_unviewed(block, "released"))
            return NULL;
        nsn_buffer_drop(block->lender->session, &block->buffer);
        forget_block(block);
    }
    Py_RETURN_NONE;
}

static void dealloc_block(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    struct block *block = (struct block *)self;
    if (is_held(block)) {
        PyObject *kind, *value, *traceback;
        PyErr_Fetch(&kind, &value, &traceback);
        nsn_buffer_drop(block->lender->session, &block->buffer);
        forget_block(block);
        if (PyErr_WarnEx(PyExc_ResourceWarning, "a borrowed buffer was neither emitted nor released: it is released now", 1))
            PyErr_WriteUnraisable((PyObject *)type);
        PyErr_Restore(kind, value, traceback);
    }
    Py_DECREF((PyObject *)block->lender);
    PyObject_Free(self);
    Py_DECREF(type);
}

PyObject *fast_borrow(PyObject *self, PyObject *argument)
{
    struct fast_connection *connection = (struct fast_connection *)self;
    Py_ssize_t size = PyNumber_AsSsize_t(argument, PyExc_OverflowError);
    if (size == -1 && PyErr_Occurred())
        return NULL;
    if (!connection->session)
        return PyLong_FromLong(-EBADF);
    struct nsn_buffer_out buffer;
    int result = nsn_buffer_take(connection->session, (uint64_t)size, &buffer);
    if (result < 0)
        return PyLong_FromLong(result);
    struct block *block = PyObject_New(struct block, fast_block_type);
    if (!block) {
        nsn_buffer_drop(connection->session, &buffer);
        return NULL;
    }
    block->lender = lends(connection->lender);
    block->buffer = buffer;
    block->size = size;
    block->views = 0;
    return (PyObject *)block;
}

/* emit(subject, reply, block, length): as libnsn's publish; the block is given away unless the number is negative. */
PyObject *fast_emit(PyObject *self, PyObject *const *given, Py_ssize_t count)
{
    struct fast_connection *connection = (struct fast_connection *)self;
    if (count != 4 || !PyBytes_Check(given[0]) || !PyBytes_Check(given[1]) || Py_TYPE(given[2]) != fast_block_type) {
        PyErr_SetString(PyExc_TypeError, "emit() takes subject and reply as bytes, a block, and a length");
        return NULL;
    }
    struct block *block = (struct block *)given[2];
    Py_ssize_t length = PyNumber_AsSsize_t(given[3], PyExc_OverflowError);
    if (length == -1 && PyErr_Occurred())
        return NULL;
    if (!is_held(block)) {
        PyErr_SetString(PyExc_ValueError, "this buffer was released or emitted: borrow another one");
        return NULL;
    }
    if (block->lender != connection->lender || length < 0 || length > block->size) {
        PyErr_SetString(PyExc_ValueError,
                        "a buffer is emitted by the connection that it was borrowed from, with a length up to its own");
        return NULL;
    }
    if (check_unviewed(block, "emitted"))
        return NULL;
    if (!connection->session)
        return PyLong_FromLong(-EBADF);
    int reached = nsn_publish_buffer(connection->session, PyBytes_AsString(given[0]), (size_t)PyBytes_Size(given[0]),
                                     PyBytes_AsString(given[1]), (size_t)PyBytes_Size(given[1]), &block->buffer,
                                     (uint64_t)length);
    if (!is_held(block))
        forget_block(block);
    return PyLong_FromLong(reached);
}

static Py_ssize_t block_length(PyObject *self)
{
    return ((struct block *)self)->size;
}

static PyObject *get_data(PyObject *self, void *unused)
{
    (void)unused;
    return PyMemoryView_FromObject(self);
}

static PyObject *get_released(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(!is_held((struct block *)self));
}

static PyObject *enter(PyObject *self, PyObject *unused)
{
    (void)unused;
    Py_INCREF(self);
    return self;
}

static PyObject *leave(PyObject *self, PyObject *arguments)
{
    (void)arguments;
    return release_block(self, NULL);
}

static PyMethodDef block_methods[] = {
    {"release", release_block, METH_NOARGS,
     "release($self, /)\n--\n\nGives the memory back unused. BufferError while something views it. Twice is no error."},
    {"__enter__", enter, METH_NOARGS, NULL},
    {"__exit__", leave, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef block_properties[] = {
    {"data", get_data, NULL, "A writable view of the bytes. ValueError when the buffer was released or emitted.", NULL},
    {"released", get_released, NULL, "Whether it was released or emitted.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot block_slots[] = {
    {Py_tp_doc, "Memory that was borrowed from the fabric: writable, until it is emitted or released."},
    {Py_tp_dealloc, dealloc_block},
    {Py_tp_methods, block_methods},
    {Py_tp_getset, block_properties},
    {Py_sq_length, block_length},
    {Py_bf_getbuffer, view_block},
    {Py_bf_releasebuffer, end_view_of_block},
    {0, NULL},
};

static PyType_Spec block_spec = {
    .name = "insane_nats._fast.Block",
    .basicsize = sizeof(struct block),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = block_slots,
};

int fast_add_lend(PyObject *module)
{
    fast_lender_type = fast_add_type(module, &lender_spec);
    fast_loan_type = fast_lender_type ? fast_add_type(module, &loan_spec) : NULL;
    fast_block_type = fast_loan_type ? fast_add_type(module, &block_spec) : NULL;
    return fast_block_type ? 0 : -1;
}
