/* Private: System V shared memory segments, for what sessions find by a number: made, checked, attached.
 *
 * Why not a file or a memfd: a segment has a number, which a small file or a table can hold and which outlives whoever made it,
 * so no descriptor is shared; nobody can truncate it, not even its owner, so nobody who reads or writes it gets SIGBUS; and it
 * takes no room in a file system that may be full. It is marked for removal as soon as it is made: Linux still lets others
 * attach it while somebody does (shmctl(2), SHM_DEST), and it goes with the last of them, however that ends.
 */
#ifndef NSN_SEGMENT_H
#define NSN_SEGMENT_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NSN_SEGMENT_OWN 0600   /* modes: for processes of its user alone, */
#define NSN_SEGMENT_READ 0644  /* or for everybody on the host to read */

struct nsn_segment_wanted { /* what a segment must be before it is used */
    size_t size;
    uint32_t uid;           /* who made it, and owns it */
    uint32_t pid;           /* the process that made it; 0: any */
    unsigned mode;          /* at least NSN_SEGMENT_OWN or NSN_SEGMENT_READ; others may never write */
    bool writable;          /* attached so */
};

/* Makes a segment of this process's effective user, zeroed, and attaches it to be written. *number is its number. 0, or a
 * negative errno with words. Not inherited by fork(), nor in core dumps. */
int nsn_segment_make(void **memory, int32_t *number, size_t size, unsigned mode, char *error, size_t error_size);

/* Attaches one that is there, of ordinary memory. 0, or a negative errno with words: -EPROTO when it is not what it should be,
 * -EINVAL or -EIDRM when it is not there. */
int nsn_segment_attach(void **memory, int32_t number, const struct nsn_segment_wanted *wanted, char *error, size_t error_size);

/* Whether an errno of nsn_segment_attach says that it is not there. */
static inline bool nsn_segment_gone(int result) { return result == -EINVAL || result == -EIDRM; }

/* Of either kind. Not in a forked child. */
void nsn_segment_detach(const void *memory);

/* Who may read it, from now on. 0, or a negative errno. */
int nsn_segment_set_mode(int32_t number, unsigned mode);

#endif
