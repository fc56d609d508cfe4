/* Copying a large payload into a block that others have read, or out of one that another processor has just written.
 *
 * From some 2 KiB on a C library copies with `rep movsb`, which has few lines under way at a time when they lie in another
 * processor's cache, and takes up to twice as long there as vectors do. So it is given steps that it copies with vectors. */
#ifndef NSN_COPY_H
#define NSN_COPY_H

#include <stddef.h>
#include <string.h>

enum { NSN_COPY_STEP = 1984 }; /* bytes: whole cache lines, fewer than 2 KiB */

static inline void nsn_copy_large(void *to, const void *from, size_t length)
{
    for (size_t done = 0, step; done < length; done += step) {
        step = length - done < NSN_COPY_STEP ? length - done : NSN_COPY_STEP;
        __asm__("" : "+r"(step)); /* a compiler that knew how small it is would itself put `rep movs` here */
        memcpy((char *)to + done, (const char *)from + done, step);
    }
}

#endif
