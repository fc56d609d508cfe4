/* Who sleeps, and who rings.
 *
 * A session has one doorbell: a Unix datagram socket bound in the application's directory (bell.SLOT). It says in its page
 * that it sleeps: `asleep` is raised to an odd number, then it looks once more, then it blocks on the doorbell. A peer that
 * has written something looks at the number behind a fence and rings once per odd number. Senders use their own, unbound
 * socket: no descriptor is shared or kept for a peer, and a full queue means that the bell has been rung.
 *
 * A session of another user than nsnd's cannot bind anything in that directory. Its doorbell has an abstract name, made of
 * the session's random identity and bound before anybody else can know that, so that nobody else has it. Whoever is let into
 * the directory, or knows the name, can ring: a ring says nothing but "look".
 */
#ifndef NSN_WAKE_H
#define NSN_WAKE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nsn_slots.h"

/* Binds directory/bell.SLOT (an old one is removed). Returns the descriptor or a negative errno. */
int nsn_bell_bind(const char *directory, uint32_t slot, char *error, size_t error_size);
/* Binds the abstract doorbell of the session with this identity. */
int nsn_bell_bind_named(const uint64_t identity[2], char *error, size_t error_size);
/* For ringing: unbound sockets, the next one made when the buffers of those before are full of rings that nobody has
 * answered yet (some 270 each): together they reach every session that there can be. */
#define NSN_RINGER_SOCKETS 16u
struct nsn_ringer {
    int sockets[NSN_RINGER_SOCKETS]; /* -1: not made */
};
void nsn_ringer_init(struct nsn_ringer *ringer);
void nsn_ringer_close(struct nsn_ringer *ringer);
/* 0: rung, or rung already. -EAGAIN: not possible now (out of descriptors), try later. -ENOENT, -ECONNREFUSED: nobody there. */
int nsn_bell_ring(struct nsn_ringer *ringer, const char *directory, uint32_t slot);
int nsn_bell_ring_named(struct nsn_ringer *ringer, const uint64_t identity[2]);
/* Takes the rings that have come (16 at most). Returns how many. */
size_t nsn_bell_answer(int bell);

/* The sleeper: raises its number to odd; the caller looks once more and wakes again if it finds something. */
void nsn_sleep_begin(struct nsn_page *page, uint64_t *number);
void nsn_sleep_end(struct nsn_page *page, uint64_t *number);
static inline bool nsn_sleeping(uint64_t number) { return number & 1; }

/* The writer, behind its release store: true when the sleeper must be rung. *rung: the number it was last rung at. */
bool nsn_wake_due(const struct nsn_page *page, uint64_t *rung);

#endif
