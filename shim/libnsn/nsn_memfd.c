/* Memory files as links and pools use them: made, checked before they are mapped, mapped. */
#include "nsn_memfd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008u
#endif
#define TMPFS_TYPE 0x01021994 /* TMPFS_MAGIC of linux/magic.h; memfds lie in tmpfs */

int nsn_memfd_create(const char *name, uint64_t size, char *error, size_t error_size)
{
    /* Kernels before 6.3 do not know NOEXEC_SEAL; later ones may be set up (vm.memfd_noexec=2) to insist on it. */
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL)
        fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) {
        int code = errno;
        snprintf(error, error_size, "cannot create shared memory (memfd_create): %s%s", strerror(code),
                 code == EMFILE || code == ENFILE ? "; raise the limit of open files (ulimit -n)" : "");
        return -code;
    }
    if (fchmod(fd, 0600) < 0 || ftruncate(fd, (off_t)size) < 0) {
        int code = errno;
        snprintf(error, error_size, "cannot set up %llu bytes of shared memory: %s", (unsigned long long)size, strerror(code));
        close(fd);
        return -code;
    }
    return fd;
}

int nsn_memfd_seal(int fd, int seals, char *error, size_t error_size)
{
    if (fcntl(fd, F_ADD_SEALS, seals) == 0)
        return 0;
    int code = errno;
    snprintf(error, error_size, "cannot seal shared memory: %s", strerror(code));
    return -code;
}

int nsn_memfd_check(int fd, const char *what, uint64_t size, int required, int forbidden, char *error, size_t error_size)
{
    struct stat status;
    struct statfs filesystem;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0) {
        int code = errno == EINVAL ? EPROTO : errno; /* EINVAL: a descriptor of another kind */
        snprintf(error, error_size, "%s is not a memory file: %s", what, strerror(errno));
        return -code;
    }
    if (fstat(fd, &status) < 0 || fstatfs(fd, &filesystem) < 0) {
        int code = errno;
        snprintf(error, error_size, "cannot look at %s: %s", what, strerror(code));
        return -code;
    }
    /* A hole in hugetlbfs is SIGBUS for who reads it when there is no huge page left: tmpfs only. */
    if (!S_ISREG(status.st_mode) || filesystem.f_type != TMPFS_TYPE) {
        snprintf(error, error_size, "%s is not an ordinary memory file", what);
        return -EPROTO;
    }
    if ((seals & required) != required || (seals & forbidden)) {
        snprintf(error, error_size, "%s has seals 0x%x; 0x%x must be set and 0x%x must not", what, (unsigned)seals,
                 (unsigned)required, (unsigned)forbidden);
        return -EPROTO;
    }
    if ((uint64_t)status.st_size != size) {
        snprintf(error, error_size, "%s has %lld bytes, expected %llu; the peer may be of another version", what,
                 (long long)status.st_size, (unsigned long long)size);
        return -EPROTO;
    }
    return 0;
}

void *nsn_memfd_map(int fd, uint64_t size, int protection, char *error, size_t error_size)
{
    void *memory = mmap(NULL, size, protection, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
        int code = errno;
        snprintf(error, error_size, "cannot map %llu bytes of shared memory: %s%s", (unsigned long long)size, strerror(code),
                 code == ENOMEM ? "; too many mappings (vm.max_map_count) or too little address space (ulimit -v)" : "");
        errno = code;
        return NULL;
    }
    if (madvise(memory, size, MADV_DONTFORK) < 0 || madvise(memory, size, MADV_DONTDUMP) < 0) {
        int code = errno;
        snprintf(error, error_size, "cannot keep shared memory out of child processes and core dumps: %s", strerror(code));
        munmap(memory, size);
        errno = code;
        return NULL;
    }
    return memory;
}
