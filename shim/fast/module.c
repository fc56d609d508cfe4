/* The module insane_nats._fast. */
#include "fast.h"

#include <string.h>

#define DEFINE(name) PyObject *fast_name_##name;
FAST_NAMES(DEFINE)
#undef DEFINE

PyTypeObject *fast_add_type(PyObject *module, PyType_Spec *spec)
{
    PyObject *type = PyType_FromSpec(spec);
    if (!type)
        return NULL;
    if (PyModule_AddObjectRef(module, strrchr(spec->name, '.') + 1, type)) {
        Py_DECREF(type);
        return NULL;
    }
    return (PyTypeObject *)type;
}

int fast_call_method(PyObject *owner, PyObject *name, PyObject *a, PyObject *b)
{
    PyObject *result = PyObject_CallMethodObjArgs(owner, name, a, b, NULL);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static int intern_names(void)
{
#define INTERN(name)                                                                                                           \
    if (!(fast_name_##name = PyUnicode_InternFromString(#name)))                                                               \
        return -1;
    FAST_NAMES(INTERN)
#undef INTERN
    return 0;
}

static int (*const adders[])(PyObject *) = {fast_add_ring, fast_add_message, fast_add_call, fast_add_connection,
                                            fast_add_subscription, fast_add_lend};

static int add_constants(PyObject *module)
{
    PyObject *yield_s = PyFloat_FromDouble(FAST_YIELD_S);
    int result = yield_s ? PyModule_AddObjectRef(module, "YIELD_S", yield_s) : -1;
    Py_XDECREF(yield_s);
    if (result || PyModule_AddIntConstant(module, "BATCH", FAST_BATCH))
        return -1;
    return PyModule_AddIntConstant(module, "YIELD_BYTES", FAST_YIELD_BYTES);
}

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "insane_nats._fast",
    .m_doc = "What Python programs pay for with every message, in C.",
    .m_size = -1, /* types and names are the process's: no subinterpreters */
};

PyMODINIT_FUNC PyInit__fast(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (!module)
        return NULL;
    if (intern_names() || add_constants(module))
        goto failed;
    for (size_t i = 0; i < sizeof adders / sizeof *adders; i++)
        if (adders[i](module))
            goto failed;
    return module;
failed:
    Py_DECREF(module);
    return NULL;
}
