/* A forked child that does one thing, and how it ended. */
#ifndef CHILD_H
#define CHILD_H

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

/* 0 when it got through; a signal's number, or less than 0 when a CHECK in it failed. */
static inline int end_of_child(void (*run)(void *), void *context)
{
    fflush(stdout);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL); /* sanitizers catch it otherwise */
        signal(SIGBUS, SIG_DFL);
        run(context);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    return WIFSIGNALED(status) ? WTERMSIG(status) : -WEXITSTATUS(status);
}

#endif
