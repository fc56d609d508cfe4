/* The words of a thread's last error. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

#include "nsn_insane_internal.h"

static _Thread_local char words[NSN_INSANE_WORDS];

int nsn_insane_fail(int error, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(words, sizeof words, format, arguments);
    va_end(arguments);
    errno = -error;
    return error;
}

const char *nsn_insane_error(void) { return words; }
