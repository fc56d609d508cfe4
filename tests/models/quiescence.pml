/* Quiescence (nsn_session_barrier.c, deliver() in nsn_session_publish.c, nsn_log_writer.c, nsn_slots_acknowledge): a
 * subscriber ends its interest and waits for a barrier. nsnd puts the removal into the log, then acknowledges it; publishers
 * show in a word that they are inside a publish, and look at the log behind a fence; the subscriber waits for those that it
 * saw inside, then for links that the board announces, then takes the links' tails as final. One publisher has a link, the
 * other makes its first one, which comes through nsnd, and may be killed at any step.
 *
 * Holds: what was matched before the removal lies before those tails, and nothing comes behind them.
 * Take out: NO_FENCE (in the publish), NO_LOOK (at the words of publishers), NO_LINK_WAIT (for links on their way),
 * ACKNOWLEDGE_FIRST (before the log has it), FORGET_DEAD (a dead publisher's announced link is not waited for), SAME_WORD (the
 * board's word is what an earlier session in that slot left there). */
#define LOG 0
#define ACKNOWLEDGED 1
#define ALIVE 2 /* of the second publisher, as nsnd shows it: 0 when it has gone */
#define PUBLISHING(slot) (3 + slot)
#define TAIL(slot) (5 + slot)
#define BOARD 7 /* the word of the second publisher, which announces its link */
#define CELLS 8
#define NSND 2
#define WRITERS 3
#define DEPTH 3
#include "tso.pml"

#ifdef SAME_WORD
#define LEFT 1
#else
#define LEFT 5
#endif

chan removal = [0] of { bit };
bool killed, link_sent, link_there, gone_there; /* a link with nsnd, and in the subscriber's socket; PEER_GONE behind it */
byte matched, ended;

inline enter(me)
{
    atomic { sent++; STORE(me, PUBLISHING(me), sent) }
#ifndef NO_FENCE
    FENCE(me);
#endif
}

proctype publisher()
{
    byte sent, count;
    do
    :: sent < 2 ->
        enter(0);
        if
        :: atomic { memory[LOG] == 0 -> count++; matched++; STORE(0, TAIL(0), count) }
        :: memory[LOG] != 0
        fi;
        STORE(0, PUBLISHING(0), 0)
    :: sent == 2 -> break
    od;
    ended++
}

proctype new_publisher()
{
    byte sent;
    {
        enter(1);
        if
        :: memory[LOG] == 0 ->
            link_sent = true; /* out_make */
            STORE(1, TAIL(1), 1);
            atomic { matched++; STORE(1, BOARD, 1) }
        :: memory[LOG] != 0
        fi;
        STORE(1, PUBLISHING(1), 0)
    }
    unless { killed };
    ended++
}

proctype nsnd()
{
    bool told;
end:
    do
    :: removal ? _ ->
#ifdef ACKNOWLEDGE_FIRST
        STORE(NSND, ACKNOWLEDGED, 1);
        STORE(NSND, LOG, 1)
#else
        STORE(NSND, LOG, 1);
        STORE(NSND, ACKNOWLEDGED, 1)
#endif
    :: atomic { link_sent && !link_there -> link_there = true }
    :: atomic { killed && link_sent == link_there && empty(buffers[1]) && !told -> told = true; STORE(NSND, ALIVE, 0) }
        gone_there = true
    od
}

inline wait_for(slot)
{
    atomic {
        seen = memory[PUBLISHING(slot)];
        if
        :: slot == 1 && !memory[ALIVE] -> seen = 0
        :: else
        fi
    }
    if
    :: !seen || memory[PUBLISHING(slot)] != seen || (slot == 1 && !memory[ALIVE])
    fi
}

proctype subscriber()
{
    byte seen, noted[2];
    bool linked, gone, word_seen, announced = true;
    removal ! 1;
    memory[ACKNOWLEDGED] == 1;
    /* the fence here is for processors that are weaker than this model's */
#ifndef NO_LOOK
    wait_for(0);
    wait_for(1);
#endif
    do /* nsn_in_announced */
    :: announced ->
        atomic { linked = link_there; gone = gone_there } /* nsn_control_receive */
        atomic {
            word_seen = memory[BOARD] != LEFT;
            announced = word_seen && !linked && !gone
        }
#ifdef FORGET_DEAD
        announced = announced && memory[ALIVE];
#endif
#ifdef NO_LINK_WAIT
        announced = false;
#endif
        if
        :: announced -> link_there || gone_there
        :: else
        fi
    :: else -> break
    od;
    noted[0] = memory[TAIL(0)];
    atomic {
        if
        :: linked -> noted[1] = memory[TAIL(1)]
        :: else
        fi
    }
    /* The barrier is done. What follows only looks at how it ended. */
    ended == 2 && empty(buffers[0]) && empty(buffers[1]);
    atomic {
        assert(noted[0] == memory[TAIL(0)]); /* nothing came behind it */
        /* nor by a link that comes later, unless its maker was killed inside that publish: it was never made */
        assert(noted[1] == memory[TAIL(1)] || (killed && memory[BOARD] == LEFT));
        assert(noted[0] + noted[1] >= matched) /* nothing is missing */
    }
}

proctype killer()
{
    if
    :: killed = true
    :: skip
    fi
}

init
{
    atomic {
        memory[ALIVE] = 1;
        memory[BOARD] = LEFT;
        run buffer(0); run buffer(1); run buffer(NSND);
        run publisher(); run new_publisher(); run nsnd(); run subscriber(); run killer()
    }
}
