/* Directories of tmpfs for tests of files that live there, and a tmpfs so small that it fills up. */
#ifndef SCRATCH_H
#define SCRATCH_H

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

static char scratch[64];

static int scratch_remove_one(const char *path, const struct stat *status, int kind, struct FTW *where)
{
    (void)status, (void)kind, (void)where;
    return remove(path);
}

static inline void scratch_remove(void)
{
    if (*scratch)
        nftw(scratch, scratch_remove_one, 8, FTW_DEPTH | FTW_PHYS);
    *scratch = '\0';
}

/* An empty directory of this test alone. */
static inline const char *scratch_make(void)
{
    scratch_remove();
    strcpy(scratch, "/dev/shm/insane_nats-test-XXXXXX");
    CHECK(mkdtemp(scratch));
    return scratch;
}

static inline int scratch_open(const char *name, int flags)
{
    char path[128];
    snprintf(path, sizeof(path), "%s/%s", scratch, name);
    return open(path, flags | O_CLOEXEC, 0600);
}

static inline bool scratch_has(const char *name)
{
    char path[128];
    struct stat status;
    snprintf(path, sizeof(path), "%s/%s", scratch, name);
    return lstat(path, &status) == 0;
}

/* Fills what is left of the file system at the scratch directory, to the last page. */
static inline void scratch_fill(void)
{
    int fd = scratch_open("filler", O_RDWR | O_CREAT);
    CHECK(fd >= 0);
    for (off_t step = 1 << 20, at = 0; step >= 4096;)
        if (fallocate(fd, 0, at, step) == 0)
            at += step;
        else
            step /= 2;
    close(fd);
}

static inline void scratch_empty(void)
{
    char path[128];
    snprintf(path, sizeof(path), "%s/filler", scratch);
    CHECK(unlink(path) == 0);
}

static inline bool scratch_write(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool written = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    if (fd >= 0)
        close(fd);
    return written;
}

/* A mount namespace of its own for this process; who is not root takes a user namespace with it, and is root in that. */
static inline bool scratch_unshare(void)
{
    char uids[64], gids[64];
    snprintf(uids, sizeof(uids), "0 %u 1", geteuid());
    snprintf(gids, sizeof(gids), "0 %u 1", getegid());
    if (geteuid() == 0)
        return unshare(CLONE_NEWNS) == 0;
    return unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0 && scratch_write("/proc/self/uid_map", uids) &&
           scratch_write("/proc/self/setgroups", "deny") && scratch_write("/proc/self/gid_map", gids);
}

/* Runs the test in a child with a tmpfs of the given size in kibibytes at the scratch directory; it is skipped where user
 * namespaces may not mount one. */
static inline void scratch_small(unsigned kibibytes, void (*run)(void))
{
    scratch_make();
    fflush(stdout);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        char options[32];
        snprintf(options, sizeof(options), "size=%uk,mode=0700", kibibytes);
        if (!scratch_unshare() || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
            mount("tmpfs", scratch, "tmpfs", 0, options))
            _exit(77);
        run();
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
        printf("skipped: no small tmpfs can be mounted here\n");
    else
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    scratch_remove();
}

#endif
