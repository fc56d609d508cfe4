/* Several users in one process, under sanitizers: the kernel keeps a user a thread (setresuid(2), the system call and
 * not the library's wrapper), and says with each connection which it was. */
#ifndef USERS_H
#define USERS_H

#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"

enum { ALICE = 65534, BOB = 61001 };

static inline void users_be(uint32_t uid) { CHECK_EQUAL(syscall(SYS_setresuid, -1, uid, -1), 0); }

/* False, in words, where only one user can be played. */
static inline bool users_possible(void)
{
    if (getuid() == 0)
        return true;
    printf("skipped: only root can be several users\n");
    return false;
}

#endif
