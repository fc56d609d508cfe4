/* Words for the caller's error slot, beside the negative errno that is returned. */
#ifndef NSN_ERROR_H
#define NSN_ERROR_H

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

/* Writes the words (cut to the slot's size; a NULL slot takes none) and returns code. */
__attribute__((format(printf, 4, 5)))
static inline int nsn_explain(char *error, size_t error_size, int code, const char *format, ...)
{
    if (error && error_size) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(error, error_size, format, arguments);
        va_end(arguments);
    }
    return code;
}

#endif
