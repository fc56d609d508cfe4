/* Waiting for room (ask() and nsn_link_out_want in nsn_link_out.c, nsn_link_in_publish in nsn_link_in.c, nsn_space): a
 * producer whose link is full, or that has no pool reference left, says what it waits for, looks once more, and waits for its
 * bell; the consumer publishes what it has read or released, and looks whether somebody wants to be rung.
 *
 * Holds: the producer gets all its messages through. One that waits for good is an invalid end state.
 * Take out: NO_SECOND_LOOK, NO_PRODUCER_FENCE, NO_CONSUMER_FENCE, NO_REAP (what was released is not taken back before asking
 * for room again), NO_PUBLISH (a position is left unpublished after reading), LATE_WORDS (the want number is stored before
 * what it stands for). */
#define MESSAGES 4
#define LIMIT 2 /* messages that may be behind */
#define REFS 3 /* pool references that may be out; each message has one */

#define TAIL 0
#define WANT 1
#define WANT_CONSUMED 2
#define WANT_RELEASED 3
#define HEAD 4
#define RELEASED 5
#define CELLS 6
#define PRODUCER 0
#define CONSUMER 1
#define WRITERS 2
#define DEPTH 4
#include "tso.pml"

bool bell; /* the producer's */

#define reap() atomic { out = sent - memory[RELEASED] }
#define look() atomic { room = sent - memory[HEAD] < LIMIT && out < REFS }

proctype producer()
{
    byte sent, out, want;
    bool room;
    do
    :: sent < MESSAGES ->
#ifndef NO_REAP
        reap();
#endif
        look();
        if
        :: room ->
            atomic { sent++; out++; STORE(PRODUCER, TAIL, sent) }
            atomic {
                if
                :: want & 1 -> want++; STORE(PRODUCER, WANT, want) /* nsn_link_out_unwant */
                :: else
                fi
            }
            reap() /* write_plan: behind a record with a reference */
        :: else ->
            atomic { want = (want & 1 -> want + 2 : want + 1) }
#ifdef LATE_WORDS
            STORE(PRODUCER, WANT, want);
#endif
            STORE(PRODUCER, WANT_CONSUMED, sent - LIMIT / 2);
            STORE(PRODUCER, WANT_RELEASED, (out < REFS -> 0 : sent - out + 1));
#ifndef LATE_WORDS
            STORE(PRODUCER, WANT, want);
#endif
#ifndef NO_PRODUCER_FENCE
            FENCE(PRODUCER);
#endif
#ifndef NO_SECOND_LOOK
#ifndef NO_REAP
            reap();
#endif
            look();
#endif
            do
            :: room -> break
            :: !room -> /* nsn_space, each time that the bell was rung */
                bell;
                bell = false;
#ifndef NO_REAP
                reap();
#endif
                look()
            od
        fi
    :: sent == MESSAGES -> break
    od
}

/* nsn_link_in_publish */
inline publish()
{
#ifndef NO_CONSUMER_FENCE
    FENCE(CONSUMER);
#endif
    want = memory[WANT];
    if
    :: (want & 1) && want != rung ->
        atomic { there = head >= memory[WANT_CONSUMED] }
        atomic { there = there && released >= memory[WANT_RELEASED] }
        atomic { there = there || (head == memory[TAIL] && head - released < REFS) }
        if
        :: there -> atomic { rung = want; want = 0; there = false; bell = true }
        :: else -> want = 0
        fi
    :: else -> want = 0
    fi
}

proctype consumer()
{
    byte head, released, want, rung;
    bool there;
    do
    :: atomic { memory[TAIL] > head -> head++ }
#ifdef NO_PUBLISH
        if
        :: skip
        :: STORE(CONSUMER, HEAD, head); publish()
        fi
#else
        STORE(CONSUMER, HEAD, head);
        publish()
#endif
    :: atomic { released < head -> released++; STORE(CONSUMER, RELEASED, released) }
        publish()
    :: released == MESSAGES -> break
    od
}

/* Somebody who rings for another reason. */
proctype passer_by() { bell = true }

init { atomic { run buffer(PRODUCER); run buffer(CONSUMER); run producer(); run consumer(); run passer_by() } }
