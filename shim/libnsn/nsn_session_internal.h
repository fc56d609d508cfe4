/* A session's insides, shared by the nsn_session_*.c files. All of it is private to the process. */
#ifndef NSN_SESSION_INTERNAL_H
#define NSN_SESSION_INTERNAL_H

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>

#include "nsn_link.h"
#include "nsn_log.h"
#include "nsn_pool.h"
#include "nsn_protocol.h"
#include "nsn_route.h"
#include "nsn_session.h"
#include "nsn_shared.h"
#include "nsn_slots.h"
#include "nsn_subject.h"
#include "nsn_wake.h"

#define NSN_FORKED "this connection was made before fork(): connect again in the child"
#define NSN_PENDING_SIZE (2ull << 20)
#define NSN_WRITE_DEADLINE_NS 10000000000ull
#define NSN_PAYLOAD_MAX (72ull << 20)
#define NSN_EVENTS 1024u
#define NSN_HOLD_NS 20000000ull       /* how long a publisher stopped inside a publish holds others' messages back, */
#define NSN_HOLD_MOST_NS 500000000ull /* and one that is not stopped, but has not got a processor */
#define NSN_HANDOVER_NS 100000000ull  /* how long an announced link that does not come holds others' messages back, */
#define NSN_HANDOVER_MOST_NS 1000000000ull /* and while nsnd is not stopped, but has not got to it */
#define NSN_STRANGER_HOLD_NS 100000000ull /* how long, at a time, another user's publisher holds others' messages back … */
#define NSN_STRANGER_REST_NS 1000000000ull /* … before it does not until this has passed, unless it was seen outside */
#define NSN_STRANGER_INSIDE_NS 500000000ull /* how long a barrier waits for one that is inside a publish */
#define NSN_STRANGER_VAIN_NS 10000000000ull /* how long no announced link of another user is waited for once one did not come */
#define NSN_BLOCKED_NS 2000000000ull  /* how long a record whose pool segment does not come holds barriers back */
#define NSN_HELD_UP_NS 1000000000ull  /* how long a publisher can be inside one publish before it is spoken of */
#define NSN_LINKS_UNREAD 16u          /* links of one producer session that are kept until they are read to their ends */
#define NSN_BATCH_BYTES (512ull << 10) /* of payloads: with so much in hand, one nsn_receive takes nothing more */
#define NSN_PASSING_BYTES (16ull << 20) /* queue messages kept for passing on; above it nothing is received */

/* A session of another user than nsnd's, and its place. */
struct nsn_other {
    const struct nsn_place *place;
    uint64_t identity[2];
    uint32_t slot, generation, uid;
    int32_t segment;
    uint32_t holds;                   /* the list's one, and one for each peer */
    uint32_t seen;                    /* its word for this session, as dealt with */
    bool attached;                    /* false: it is this session itself */
    bool stranger;                    /* its user is not this session's */
    bool in_vain;                     /* its announced link is waited for no more */
    uint64_t not_waited_until;        /* barriers do not wait for its publishes until then */
};

/* What a publish needs of a link. */
struct nsn_need {
    uint32_t length;                  /* bytes in all, or of the longest of `parts` records */
    uint32_t parts;                   /* 0: not in parts */
    uint64_t pool;                    /* bytes in the pool */
};

/* A subscription of a queue group that a consumer has removed while messages for it may still lie unread in its link. */
struct nsn_former {
    struct nsn_former *next;
    uint32_t sid;
    uint32_t length;
    char queue[];
};

/* Where this session writes to: one a consumer session. */
struct nsn_peer_out {
    struct nsn_link_out *link;
    uint32_t slot, generation;
    uint64_t rung;                    /* the sleep number it was last rung at */
    int fd;                           /* the link's descriptor until it has been taken, else -1 */
    const struct nsn_page *page;      /* the consumer's */
    uint32_t *word;                   /* this session's for it, on a board */
    uint32_t nudges;                  /* how often it was to look though nothing was written */
    struct nsn_other *other;          /* the consumer is one; held */
    bool copies;                      /* the consumer's user is another: it cannot read this session's pool */
    bool want;                        /* a publish waits for room in it, */
    struct nsn_need need;             /* as much as this */
    bool parted;                      /* its session has ended, and its queue messages were taken back */
    bool unrung;                      /* ringing failed for want of buffer: to be tried again */
    uint32_t shown;                   /* pool segments handed over, in the link's life */
    uint8_t segments[NSN_POOL_SEGMENTS / 8]; /* pool segments (by place) that were handed over */
    struct nsn_former *formers;       /* newest first */
    uint32_t former_count;
    struct nsn_peer_out *next;        /* all of them */
};

/* Where this session reads from: one a producer session. */
struct nsn_peer_in {
    struct nsn_link_in *link;
    uint32_t slot, generation;
    const struct nsn_page *page;      /* the producer's */
    struct nsn_other *other;          /* the producer is one; held */
    bool stranger;                    /* the producer's user is not this session's */
    uint64_t held_since;              /* a stranger's publish is waited for since then; 0: it was seen outside */
    bool active;                      /* in the session's list of links that may have something */
    bool gone;                        /* the producer has ended: read to the end, then drop */
    bool blocked;                     /* its next record needs a pool segment that has not come yet */
    uint64_t blocked_since;
    uint64_t hold_stamp, hold_asked;  /* the publish that the kernel was last asked about, and when */
    bool hold_stopped;
    struct nsn_segment_in **segments;
    uint32_t segment_count, segment_room;
    uint32_t larges;                  /* borrowed messages that still point into it */
    struct nsn_peer_in *next;
};

/* Part of a publish's plan: plan[first …] are subscriptions of one session. */
struct nsn_group {
    struct nsn_peer_out *peer;
    uint32_t first, count;
    bool drop;                        /* the session was given up, or is full and the publisher does not wait */
    bool stalled;                     /* it was given up: it is told how many messages it did not get */
    bool late;                        /* it has answered meanwhile, and is to look again */
};

enum nsn_subscription_state { NSN_SUB_LIVE = 1, NSN_SUB_DRAINING = 2, NSN_SUB_GHOST = 3 };

struct nsn_subscription {
    uint32_t sid;
    uint8_t state;                    /* GHOST: removed, kept until nothing can reach it any more, to pass queue messages on */
    uint16_t pattern_length, queue_length;
    uint64_t max, delivered;
    uint64_t removed_sequence;        /* interest sequence that carries its removal */
    char *names;                      /* pattern, then queue */
};

struct nsn_subscriptions {            /* open addressing by sid */
    struct nsn_subscription **entries;
    uint32_t size, used, live, ghosts;
};

/* A packet to nsnd that waits to be sent. */
struct nsn_outgoing {
    struct nsn_outgoing *next;
    int fd;                           /* sent along; not owned */
    uint32_t length;
    uint8_t bytes[];
};

/* A batch of interest changes that nsnd has not acknowledged. */
struct nsn_batch {
    struct nsn_batch *next;
    uint64_t sequence;
    uint32_t count, length, capacity; /* of bytes */
    uint8_t bytes[] __attribute__((aligned(8))); /* struct nsn_interest and its changes */
};

struct nsn_large {
    struct nsn_peer_in *peer;
    struct nsn_segment_in *segment;
    const uint8_t *data;
    uint8_t *copy;                    /* of a message that came in parts; then there is neither peer nor segment */
    uint32_t ref, use, holds, next_free;
};

/* A queue message that waits for room at another member. */
struct nsn_passing {
    struct nsn_passing *next;
    uint32_t sid;                     /* own subscription that could not take it, UINT32_MAX: another session's */
    uint16_t subject_length, reply_length, queue_length;
    uint32_t header_length;
    uint64_t payload_length;
    uint64_t waits_since;             /* when all members were found to be full, ns; 0: not yet */
    bool refused;                     /* the user of the one that it came to may not have it */
    uint32_t over_slot, over_generation; /* its publisher, which is passed over, too; generation 0: it is not */
    uint8_t bytes[];                  /* subject, reply, queue, headers, payload */
};

struct nsn_seen { uint32_t slot, generation; uint64_t number, link_id; };

struct nsn_barrier {
    struct nsn_barrier *next;
    int token;
    int stage;
    uint64_t sequence;
    uint64_t waits_since;             /* for publishers to leave, ns */
    bool held_up;                     /* by the one that is waited for now, and that was said */
    struct nsn_seen *waits;
    uint32_t count;
};

struct nsn_session {
    pthread_mutex_t lock;
    int state;
    struct nsn_session_options options;
    char name[128], socket_path[256], error[512];
    uint64_t identity[2];
    uint64_t *fork_canary;            /* wiped in a forked child */
    uint64_t client_id, max_payload;
    bool challenged;                  /* nsnd waits for credentials */
    char nonce[64];
    int relay;                        /* descriptor of nsnd's relay; -1: none */
    int32_t refusal;                  /* errno of the last REFUSED */
    uint32_t slot, generation;
    uint16_t protocol;                /* version that is spoken with nsnd */
    char directory[256], version[32];
    uint64_t random;

    /* control */
    int spare;                        /* given up for a moment to take a descriptor when there is no other left */
    int control, bell;
    uint32_t node_pid, node_uid;      /* nsnd's */
    uint32_t uid;                     /* this session's user, as nsnd knows it */
    bool is_other;                    /* that is not nsnd's user */
    struct nsn_place *own_place;      /* then: its place, */
    int32_t own_segment;              /* where that lies, */
    int own_bell;                     /* and its doorbell: all of the session's life; else NULL, -1, -1 */
    struct nsn_ringer ringer;
    struct nsn_outgoing *outgoing, **outgoing_last;
    struct nsn_batch *sent, **sent_last, *batch; /* batch: being filled */
    uint64_t sequence, settled;       /* last used; highest known to be in the log */

    /* shared */
    struct nsn_slots_map map;
    struct nsn_page *page;
    uint32_t *board;                  /* this session's own */
    uint32_t board_seen[NSN_SLOTS_MAX];
    uint64_t announced_since;         /* a link was announced on the board and has not come; 0: none */
    bool announced_by_strangers;      /* and by nobody else */
    uint64_t strangers_vain_since;    /* a stranger's announced link did not come; 0: never */
    struct nsn_other **others;        /* all that this session knows */
    uint32_t other_count, other_room;
    uint32_t others_ended;            /* of these: sessions that have ended, and whose last word is still to be seen */
    uint64_t others_number;           /* of the table's changes of others, the last that is known here */
    struct nsn_other *other_at[NSN_SLOTS_MAX];
    uint64_t in_vain[NSN_SLOTS_MAX];  /* generation of the session whose announced link is waited for no more */
    uint64_t sleep_number;
    bool lost;                        /* what an earlier node knew of it, and that is not said yet */
    struct nsn_log_reader log;
    struct nsn_routes *routes;
    struct nsn_counters counters;     /* private copy of the page's */

    /* publish */
    struct nsn_pool *pool;
    uint32_t segment_at[NSN_POOL_SEGMENTS]; /* number of the pool segment in each place */
    struct nsn_peer_out *out[NSN_SLOTS_MAX], *outs;
    uint64_t last_stamp, link_ids;
    uint32_t unlinked[NSN_SLOTS_MAX]; /* generation of the session with which no version is shared; said once */
    uint32_t untaken;                 /* links whose consumer has not mapped them */
    struct nsn_target *plan;          /* where the publish in hand goes, by slot */
    uint32_t plan_count, plan_room;
    struct nsn_group *groups;         /* the plan, one group a consumer session */
    uint32_t group_count, group_room;
    uint32_t budget_countdown, over_budget_slot; /* UINT32_MAX: within the budget */
    uint64_t links_touched;           /* at the last look */
    uint64_t written, written_most;   /* bytes of records since then, and with how many the next look is due */
    uint64_t pool_share;              /* bytes of the pool that one consumer may hold, as of when one was taken */
    bool waiting, waiting_pool;       /* a publish was told -EAGAIN; for want of pool memory */
    uint32_t wait_slot;               /* whose link the last one that was told so waits for */
    bool unrung;

    /* receive */
    struct nsn_peer_in *in[NSN_SLOTS_MAX], *ins; /* ins: also those whose slot has a newer session */
    uint32_t in_count;
    struct nsn_peer_in **active;      /* heap by stamp during a receive */
    uint64_t *active_stamp;
    uint32_t active_count, active_room;
    bool held;
    uint64_t latest;                  /* stamp of the earliest publish that is under way to this session among others */
    uint64_t clock;                   /* as it was last read for a look */
    struct nsn_subscriptions subscriptions;
    struct nsn_large *larges;
    uint32_t large_room, large_free;  /* large_free: UINT32_MAX when none */
    struct nsn_passing *passing, **passing_last;
    uint64_t passing_bytes;

    struct nsn_barrier *barriers;
    int barrier_token, ghost_barrier;
    uint64_t ghost_sequence;

    struct nsn_event events[NSN_EVENTS];
    uint32_t event_first, event_count;
    uint64_t events_lost;
};

/* What a publish carries, wherever its parts lie. */
struct nsn_parts {
    const char *subject, *reply;
    uint16_t subject_length, reply_length;
    const uint8_t *headers, *payload;
    uint32_t header_length;
    uint64_t payload_length;
    struct nsn_block *block;          /* payload (and headers) already lie there; held by the caller */
    uint64_t stamp;
    uint8_t flags;
    bool unreliable;              /* as the session's option */
    uint32_t over_slot, over_generation; /* in queue groups this session is passed over; generation 0: none is */
};

/* Words of the last error; returns the errno given. */
int nsn_fail(struct nsn_session *s, int error, const char *format, ...) __attribute__((format(printf, 3, 4), cold));
void nsn_post_event(struct nsn_session *s, const struct nsn_event *event) __attribute__((cold));
static inline bool nsn_alive(const struct nsn_session *s, uint32_t slot, uint32_t generation)
{
    return nsn_load_acquire(&s->map.slots->slot[slot].alive) == generation;
}
static inline bool nsn_in_child(const struct nsn_session *s) { return *s->fork_canary == 0; }
static inline void nsn_count(struct nsn_session *s, uint64_t *private_counter, uint64_t *shared_counter, uint64_t more)
{
    (void)s;
    *private_counter += more;
    nsn_store_relaxed(shared_counter, *private_counter);
}
#define NSN_COUNT(session, field, more) \
    nsn_count((session), &(session)->counters.field, &(session)->page->counters.field, (more))
#define NSN_GAUGE(session, field, value) \
    nsn_store_relaxed(&(session)->page->counters.field, (session)->counters.field = (value))

/* control (nsn_session_control.c) */
int nsn_control_send(struct nsn_session *s, const void *packet, size_t length, int fd);
int nsn_control_flush(struct nsn_session *s);
int nsn_control_receive(struct nsn_session *s);
void nsn_interest_flush(struct nsn_session *s);
int nsn_interest_queue(struct nsn_session *s, uint8_t op, uint32_t sid, const char *pattern, size_t pattern_length,
                       const char *queue, size_t queue_length);
bool nsn_interest_known(struct nsn_session *s);
void nsn_detach(struct nsn_session *s, const char *why);
int nsn_control_hello(struct nsn_session *s);
int nsn_control_credentials(struct nsn_session *s, const uint8_t *json, size_t length);

/* publish (nsn_session_publish.c) */
uint64_t nsn_publish_enter(struct nsn_session *s);
void nsn_publish_leave(struct nsn_session *s);
int nsn_deliver_queue(struct nsn_session *s, const struct nsn_parts *parts, const char *queue, size_t queue_length,
                      uint32_t excluded_sid);

/* outgoing links (nsn_session_out.c) */
void nsn_out_drop(struct nsn_session *s, struct nsn_peer_out *peer);
void nsn_out_check_taken(struct nsn_session *s);
bool nsn_out_all_taken(struct nsn_session *s);
bool nsn_out_all_passed_on(struct nsn_session *s);
void nsn_out_resend(struct nsn_session *s);
void nsn_out_peer_gone(struct nsn_session *s, uint32_t slot, uint32_t generation);
void nsn_out_ring_again(struct nsn_session *s);

/* memory (nsn_session_memory.c) */
size_t nsn_memory_trim(struct nsn_session *s);
void nsn_memory_segment_gone(struct nsn_session *s, const struct nsn_segment_gone *gone);

/* others (nsn_session_others.c) */
void nsn_others_renew(struct nsn_session *s, bool at_first);
void nsn_others_drop_ended(struct nsn_session *s);
struct nsn_other *nsn_other_find(struct nsn_session *s, uint32_t slot, uint32_t generation);
const struct nsn_page *nsn_page_of(const struct nsn_session *s, const struct nsn_other *other, uint32_t slot);
bool nsn_is_stranger(const struct nsn_session *s, uint32_t slot);
int nsn_ring(struct nsn_session *s, const struct nsn_other *other, uint32_t slot);
void nsn_other_hold(struct nsn_other *other);
void nsn_other_drop(struct nsn_other *other);
void nsn_others_free(struct nsn_session *s);
int nsn_own_place_make(struct nsn_session *s);
void nsn_own_place_free(struct nsn_session *s);

/* incoming links (nsn_session_in.c), and what is there (nsn_session_look.c) */
int nsn_in_link(struct nsn_session *s, uint32_t slot, uint32_t generation, uint32_t uid, uint64_t link_id, int fd);
int nsn_in_segment(struct nsn_session *s, uint32_t slot, uint32_t generation, uint32_t segment, uint64_t size, int fd);
void nsn_in_peer_gone(struct nsn_session *s, uint32_t slot, uint32_t generation);
void nsn_in_drop_all(struct nsn_session *s);
void nsn_in_check_alive(struct nsn_session *s);
bool nsn_in_pending(struct nsn_session *s);
bool nsn_process_stopped(uint32_t pid);
bool nsn_in_announced(struct nsn_session *s, uint64_t now);

/* passing on (nsn_session_pass_on.c) */
/* The record has named that subscription already: each time would be another copy of the message. */
static inline bool nsn_sid_named_before(const struct nsn_record_view *view, uint32_t at)
{
    for (uint32_t i = 0; i < at; i++)
        if (view->sids[i] == view->sids[at])
            return true;
    return false;
}
struct nsn_passing *nsn_pass_on_queue(struct nsn_session *s, uint32_t sid, const struct nsn_record_view *view,
                                      const uint8_t *inside, const char *queue, size_t queue_length,
                                      uint32_t publisher_slot, uint32_t publisher_generation);
bool nsn_pass_on_waiting(struct nsn_session *s);
uint64_t nsn_pass_on_due(const struct nsn_session *s);
void nsn_pass_on_parting(void *session, uint32_t slot, uint32_t generation, const uint32_t *sid);
void nsn_pass_on_take_back(struct nsn_session *s, struct nsn_peer_out *peer);
void nsn_pass_on_forget(struct nsn_peer_out *peer);
void nsn_pass_on_free(struct nsn_session *s);

/* subscriptions (nsn_session_interest.c) */
struct nsn_subscription *nsn_subscription_find(struct nsn_session *s, uint32_t sid);
void nsn_subscription_remove(struct nsn_session *s, struct nsn_subscription *subscription);
void nsn_ghosts_step(struct nsn_session *s);
void nsn_subscriptions_free(struct nsn_session *s);

/* barriers (nsn_session_barrier.c) */
int nsn_barrier_start(struct nsn_session *s);
int nsn_barrier_step(struct nsn_session *s, int token);
void nsn_barriers_free(struct nsn_session *s);

#endif
