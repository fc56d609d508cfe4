/* Sleeping and ringing (nsn_wake.c, arm() in nsn_session.c, nsn_out_announce() in nsn_session_out.h, wake_plan() in
 * nsn_session_publish.c): a consumer that found nothing raises its number, looks once more, and blocks on its bell; a
 * producer that has written looks at the number, and rings once for each odd one.
 *
 * Holds: nothing that was written lies unread while the consumer sleeps for good. A lost wake-up is an invalid end state.
 * Take out: NO_SECOND_LOOK, NO_WRITER_FENCE, NO_SLEEPER_FENCE, NO_NEW_NUMBER (every sleep is under the same one),
 * NO_RING_AGAIN (a ring that the sender's full buffer did not take is not tried again). */
#define MESSAGES 3 /* two of the first producer, one of the second */

#define BOARD(slot) (slot) /* the word of the consumer's board that a producer writes, behind its link's tail */
#define ASLEEP 2
#define CONSUMER 2
#define CELLS 3
#define WRITERS 3
#define DEPTH 2
#include "tso.pml"

bool bell; /* its queue holds one ring: more are refused, which says that it has been rung */

proctype producer(byte me; byte messages)
{
    byte sent, number, rung;
    bool refused;
    do
    :: atomic { sent < messages -> sent++; STORE(me, BOARD(me), sent) }
#ifndef NO_WRITER_FENCE
        FENCE(me); /* wake_plan */
#endif
        atomic {
            number = memory[ASLEEP];
            if
            :: (number & 1) && number != rung -> rung = number
            :: else -> number = 0
            fi
        }
        do
        :: atomic { number -> bell = true; number = 0 }
        :: atomic { number && !refused -> refused = true } /* -EAGAIN: its rings lie unanswered elsewhere */
#ifdef NO_RING_AGAIN
            number = 0
#endif
        :: !number -> break
        od
    :: sent == messages -> break
    od
}

inline look(from)
{
    atomic { found = found || memory[BOARD(from)] != seen[from] }
}

inline take(from)
{
    atomic {
        assert(memory[BOARD(from)] >= seen[from]);
        found = found || memory[BOARD(from)] != seen[from];
        received = received + memory[BOARD(from)] - seen[from];
        seen[from] = memory[BOARD(from)]
    }
}

proctype consumer()
{
    byte seen[2], received, number;
    bool found;
    do
    :: received < MESSAGES ->
        found = false;
        take(0);
        take(1);
        if
        :: !found && received < MESSAGES ->
            atomic { number++; STORE(CONSUMER, ASLEEP, number) } /* nsn_sleep_begin */
#ifndef NO_SLEEPER_FENCE
            FENCE(CONSUMER);
#endif
#ifndef NO_SECOND_LOOK
            look(0);
            look(1);
#endif
            if
            :: found
            :: !found -> bell
            fi;
#ifdef NO_NEW_NUMBER
            number = 0;
#else
            number++;
#endif
            STORE(CONSUMER, ASLEEP, number); /* nsn_disarm: awake first, then the rings are taken, then it looks */
            bell = false
        :: else
        fi
    :: else -> break
    od
}

init
{
    atomic {
        run buffer(0); run buffer(1); run buffer(CONSUMER);
        run producer(0, 2); run producer(1, 1);
        run consumer()
    }
}
