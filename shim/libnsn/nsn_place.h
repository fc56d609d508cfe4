/* The place of a session whose user is not nsnd's. Such a session cannot write the node's places: its page, and the board that
 * it writes, lie in a segment (nsn_segment.h) that its own process makes. Everybody else attaches that read-only. Its number
 * lies in the table of sessions, and so outlives nsnd.
 */
#ifndef NSN_PLACE_H
#define NSN_PLACE_H

#include <stddef.h>
#include <stdint.h>

#include "nsn_slots.h"

/* Makes a segment of this process's effective user, mode 0644, zeroed. *segment is its number. 0, or a negative errno with
 * words. Not inherited by fork(), nor in core dumps. */
int nsn_place_make(struct nsn_place **place, int32_t *segment, char *error, size_t error_size);

/* Attaches another session's read-only, and checks that it is one: made and owned by user `uid` (and by process `pid`, unless
 * that is 0), of the right size, of ordinary memory, to be written by that user alone. 0, or a negative errno with words:
 * -EPROTO when it is not what it should be, -EINVAL or -EIDRM when it is not there. */
int nsn_place_attach(const struct nsn_place **place, int32_t segment, uint32_t uid, uint32_t pid, char *error,
                     size_t error_size);

/* Of either kind. Not in a forked child. */
void nsn_place_detach(const struct nsn_place *place);

#endif
