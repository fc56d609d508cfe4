/* nsnd's short way for what sessions ask most: changes of interest, one after the other, each waited for.
 *
 * A packet is looked at where it lies. Only a whole, valid INTEREST that is the session's next one and can be applied is
 * taken here; everything else stays in the socket for the long way, which knows every case.
 */
#ifndef NSN_SERVE_H
#define NSN_SERVE_H

#include <stddef.h>
#include <stdint.h>

#include "nsn_log.h"
#include "nsn_slots.h"

/* Serves one session's control socket. settled: the last sequence number in the log; raised and acknowledged (in the table) for
 * each packet. After the last one it waits spin_ns for another, but returns after `most` packets. Returns how many were
 * served; the caller answers INTEREST_DONE for the last, once. Neither blocks nor fails. */
int nsn_serve_interest(struct nsn_log_writer *writer, struct nsn_slots *slots, uint32_t slot, uint32_t generation,
                       uint64_t *settled, int fd, int most, uint64_t spin_ns);

#endif
