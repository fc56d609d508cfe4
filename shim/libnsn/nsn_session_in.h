/* What the files of a session's receiving side share: links (nsn_session_in.c), what is there (nsn_session_look.c), and the
 * messages, in order (nsn_session_receive.c). */
#ifndef NSN_SESSION_IN_H
#define NSN_SESSION_IN_H

#include "nsn_session_internal.h"

/* In the list of those that may have something, and out of it. */
void nsn_in_activate(struct nsn_session *s, struct nsn_peer_in *peer);
void nsn_in_deactivate(struct nsn_session *s, struct nsn_peer_in *peer);
void nsn_in_drop(struct nsn_session *s, struct nsn_peer_in *peer);
/* Its producer did what is impossible: an event that says what, and the link is dropped. */
void nsn_in_broken(struct nsn_session *s, struct nsn_peer_in *peer, const char *what) __attribute__((cold));
/* Shows the producer how far this session has read, and rings when it waits for that. */
void nsn_in_show_progress(struct nsn_session *s, struct nsn_peer_in *peer);

/* Where the peer's list has that segment; NULL: it is not there (any more). */
struct nsn_segment_in **nsn_in_segment_place(struct nsn_peer_in *peer, uint32_t segment);
void nsn_in_segment_gone(struct nsn_peer_in *peer, uint32_t segment);
/* Sets *handle to a new large message, or leaves it when there is no memory for that. *copy, of one that came in parts, is
 * taken: NULL then. */
void nsn_in_lend(struct nsn_session *s, struct nsn_peer_in *peer, const struct nsn_record_view *view,
                 struct nsn_segment_in *segment, const uint8_t *inside, uint8_t **copy, uint32_t *handle);

/* Looks over the board: activates the links that have changed, notes what is under way. now: a reading of the clock. */
void nsn_look(struct nsn_session *s, uint64_t now);
/* What a look without the clock has found. */
enum nsn_sight {
    NSN_SIGHT_NOTHING,
    NSN_SIGHT_ONE,     /* one link has something, and up to *end that follows from nothing that is not read yet */
    NSN_SIGHT_UNCLEAR, /* nsn_look() is to look */
};
enum nsn_sight nsn_look_for_one(struct nsn_session *s, struct nsn_peer_in **one, uint64_t *end);
/* Between rounds, without the lock and the clock: nobody has written to the board. */
bool nsn_is_quiet(const struct nsn_session *s);

#endif
