/* Places in System V shared memory: made, checked, attached. */
#include "nsn_place.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>

#include "nsn_error.h"

#define MODE 0644
#define TRIES 16                    /* at an address that another thread may take in between */
#define HUGE_PAGE (64u << 10)       /* no huge page is smaller */

static int keep_private(void *memory)
{
    return madvise(memory, sizeof(struct nsn_place), MADV_DONTFORK) || madvise(memory, sizeof(struct nsn_place), MADV_DONTDUMP)
               ? -errno
               : 0;
}

int nsn_place_make(struct nsn_place **place, int32_t *segment, char *error, size_t error_size)
{
    int number = shmget(IPC_PRIVATE, sizeof(struct nsn_place), IPC_CREAT | IPC_EXCL | MODE);
    if (number < 0)
        return nsn_explain(error, error_size, -errno, "no shared memory segment can be made (shmget: %s)%s", strerror(errno),
                           errno == ENOSPC ? "; raise the limit kernel.shmmni, or see with ipcs -m who has them all" : "");
    void *memory = shmat(number, NULL, 0);
    int result = memory == (void *)-1 ? -errno : 0;
    shmctl(number, IPC_RMID, NULL); /* it stays until the last one detaches it */
    if (!result && (result = keep_private(memory)))
        shmdt(memory);
    if (result)
        return nsn_explain(error, error_size, result, "a shared memory segment cannot be attached: %s", strerror(-result));
    *place = memory;
    *segment = number;
    return 0;
}

/* At an address where no huge page can begin: huge memory, a hole of which may be SIGBUS for who reads it, does not attach. An
 * address that is taken meanwhile is refused by the kernel, not overwritten. */
static int attach_small_pages(int32_t segment, void **memory)
{
    for (int i = 0; i < TRIES; i++) {
        size_t room = sizeof(struct nsn_place) + 2 * HUGE_PAGE;
        uint8_t *start = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (start == MAP_FAILED)
            return -errno;
        munmap(start, room);
        *memory = shmat(segment, start + ((uintptr_t)start % HUGE_PAGE ? 0 : SHMLBA), SHM_RDONLY);
        if (*memory != (void *)-1)
            return 0;
        if (errno != EINVAL)
            return -errno;
    }
    return -EPROTO;
}

static int check(int32_t segment, uint32_t uid, uint32_t pid, char *error, size_t error_size)
{
    struct shmid_ds status;
    if (segment < 0 || shmctl(segment, IPC_STAT, &status) < 0) {
        int result = segment < 0 ? -EINVAL : -errno;
        return nsn_explain(error, error_size, result, "segment %d is not there: %s; are both in one IPC namespace?", segment,
                           strerror(-result));
    }
    if (status.shm_segsz == sizeof(struct nsn_place) && status.shm_perm.uid == uid && status.shm_perm.cuid == uid &&
        (status.shm_perm.mode & 0777) == MODE && (!pid || (uint32_t)status.shm_cpid == pid))
        return 0;
    return nsn_explain(error, error_size, -EPROTO,
                       "segment %d has %zu bytes, user %u (made by %u), mode %o, and was made by process %d: expected were %zu "
                       "bytes, user %u, mode %o, and the session's own process", segment, status.shm_segsz, status.shm_perm.uid,
                       status.shm_perm.cuid, status.shm_perm.mode & 0777u, (int)status.shm_cpid, sizeof(struct nsn_place), uid,
                       MODE);
}

int nsn_place_attach(const struct nsn_place **place, int32_t segment, uint32_t uid, uint32_t pid, char *error,
                     size_t error_size)
{
    void *memory;
    int result = check(segment, uid, pid, error, error_size);
    if (result)
        return result;
    result = attach_small_pages(segment, &memory);
    if (result)
        return nsn_explain(error, error_size, result, "segment %d cannot be attached: %s", segment,
                           result == -EPROTO ? "it is not of ordinary memory" : strerror(-result));
    /* Once more, while it is attached: under this number there can be no other one now. */
    result = check(segment, uid, pid, error, error_size);
    if (!result && (result = keep_private(memory)))
        nsn_explain(error, error_size, result, "segment %d cannot be kept to this process: %s", segment, strerror(-result));
    if (result) {
        shmdt(memory);
        return result;
    }
    *place = memory;
    return 0;
}

void nsn_place_detach(const struct nsn_place *place) { shmdt(place); }
