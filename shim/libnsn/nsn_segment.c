/* System V shared memory segments: made, checked, attached. */
#include "nsn_segment.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>

#include "nsn_error.h"

#define TRIES 16                    /* at an address that another thread may take in between */
#define HUGE_PAGE (64u << 10)       /* no huge page is smaller */

static int keep_private(void *memory, size_t size)
{
    return madvise(memory, size, MADV_DONTFORK) || madvise(memory, size, MADV_DONTDUMP) ? -errno : 0;
}

static const char *way_out(int error)
{
    return error == ENOSPC ? "; raise the limits kernel.shmmni and kernel.shmall, or see with ipcs -m who has them all"
         : error == EINVAL ? "; raise the limit kernel.shmmax" : "";
}

int nsn_segment_make(void **memory, int32_t *number, size_t size, unsigned mode, char *error, size_t error_size)
{
    int made = shmget(IPC_PRIVATE, size, (int)(IPC_CREAT | IPC_EXCL | mode));
    if (made < 0)
        return nsn_explain(error, error_size, -errno, "no shared memory segment of %zu bytes can be made (shmget: %s)%s", size,
                           strerror(errno), way_out(errno));
    *memory = shmat(made, NULL, 0);
    int result = *memory == (void *)-1 ? -errno : 0;
    shmctl(made, IPC_RMID, NULL); /* it stays until the last one detaches it */
    if (!result && (result = keep_private(*memory, size)))
        shmdt(*memory);
    if (result)
        return nsn_explain(error, error_size, result, "a shared memory segment cannot be attached: %s", strerror(-result));
    *number = made;
    return 0;
}

/* At an address where no huge page can begin: huge memory, a hole of which may be SIGBUS for who reads it, does not attach. An
 * address that is taken meanwhile is refused by the kernel, not overwritten. */
static int attach_small_pages(int32_t number, size_t size, int flags, void **memory)
{
    for (int i = 0; i < TRIES; i++) {
        size_t room = size + 2 * HUGE_PAGE;
        uint8_t *start = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (start == MAP_FAILED)
            return -errno;
        munmap(start, room);
        *memory = shmat(number, start + ((uintptr_t)start % HUGE_PAGE ? 0 : SHMLBA), flags);
        if (*memory != (void *)-1)
            return 0;
        if (errno != EINVAL)
            return -errno;
    }
    return -EPROTO;
}

static int check(int32_t number, const struct nsn_segment_wanted *wanted, char *error, size_t error_size)
{
    struct shmid_ds status;
    if (number < 0 || shmctl(number, IPC_STAT, &status) < 0) {
        int result = number < 0 ? -EINVAL : -errno;
        return nsn_explain(error, error_size, result, result == -EACCES ? "segment %d is closed to this user: %s"
                                                      : "segment %d is not there: %s; are both in one IPC namespace?", number,
                           strerror(-result));
    }
    unsigned mode = status.shm_perm.mode & 0777u;
    if (status.shm_segsz == wanted->size && status.shm_perm.uid == wanted->uid && status.shm_perm.cuid == wanted->uid &&
        (mode & wanted->mode) == wanted->mode && !(mode & ~(unsigned)NSN_SEGMENT_READ) &&
        (!wanted->pid || (uint32_t)status.shm_cpid == wanted->pid))
        return 0;
    return nsn_explain(error, error_size, -EPROTO,
                       "segment %d has %zu bytes, user %u (made by %u), mode %o, and was made by process %d: expected were %zu "
                       "bytes, user %u, mode %o%s", number, status.shm_segsz, status.shm_perm.uid, status.shm_perm.cuid, mode,
                       (int)status.shm_cpid, wanted->size, wanted->uid, wanted->mode,
                       wanted->pid ? ", and the session's own process" : "");
}

int nsn_segment_attach(void **memory, int32_t number, const struct nsn_segment_wanted *wanted, char *error, size_t error_size)
{
    void *attached;
    int result = check(number, wanted, error, error_size);
    if (result)
        return result;
    result = attach_small_pages(number, wanted->size, wanted->writable ? 0 : SHM_RDONLY, &attached);
    if (result)
        return nsn_explain(error, error_size, result, "segment %d cannot be attached: %s", number,
                           result == -EPROTO ? "it is not of ordinary memory" : strerror(-result));
    /* Once more, while it is attached: under this number there can be no other one now. */
    result = check(number, wanted, error, error_size);
    if (!result && (result = keep_private(attached, wanted->size)))
        nsn_explain(error, error_size, result, "segment %d cannot be kept to this process: %s", number, strerror(-result));
    if (result) {
        shmdt(attached);
        return result;
    }
    *memory = attached;
    return 0;
}

void nsn_segment_detach(const void *memory) { shmdt(memory); }

int nsn_segment_set_mode(int32_t number, unsigned mode)
{
    struct shmid_ds status;
    if (shmctl(number, IPC_STAT, &status) < 0)
        return -errno;
    status.shm_perm.mode = (unsigned short)mode;
    return shmctl(number, IPC_SET, &status) < 0 ? -errno : 0;
}
