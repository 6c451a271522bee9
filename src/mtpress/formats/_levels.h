/* Which of a module's kernels run on this machine, and the Python module that names them.

   To be included behind `levels`, an array of structs that begin with `const char *name`, fastest first: on X86 "avx512", "avx2" and
   "generic", elsewhere "generic" alone. */

enum { LEVELS = sizeof levels / sizeof *levels };

static int runs_here(int level)
{
#ifdef X86
    __builtin_cpu_init();
    if (level == 0)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
    if (level == 1)
        return !!__builtin_cpu_supports("avx2");
#endif
    return level == LEVELS - 1;
}

/* Index of the level of that name, or -1 with ValueError set where this machine has none. */
static int find_level(const char *name)
{
    for (int level = 0; level < LEVELS; level++)
        if (strcmp(levels[level].name, name) == 0 && runs_here(level))
            return level;
    PyErr_Format(PyExc_ValueError, "no kernel '%s' on this machine", name);
    return -1;
}

/* The module, with the names of the levels that run here in LEVELS. */
static PyObject *module_with_levels(struct PyModuleDef *definition)
{
    PyObject *module = PyModule_Create(definition), *names = PyList_New(0), *tuple = NULL;
    if (module == NULL || names == NULL)
        goto failed;
    for (int level = 0; level < LEVELS; level++) {
        if (!runs_here(level))
            continue;
        PyObject *name = PyUnicode_FromString(levels[level].name);
        int bad = name == NULL || PyList_Append(names, name) < 0;
        Py_XDECREF(name);
        if (bad)
            goto failed;
    }
    tuple = PyList_AsTuple(names);
    if (tuple == NULL || PyModule_AddObjectRef(module, "LEVELS", tuple) < 0)
        goto failed;
    Py_DECREF(tuple);
    Py_DECREF(names);
    return module;
failed:
    Py_XDECREF(tuple);
    Py_XDECREF(names);
    Py_XDECREF(module);
    return NULL;
}
