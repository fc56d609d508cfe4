/* Causal order (write_plan() in nsn_session_publish.c, nsn_look() and nsn_look_for_one() in nsn_session_look.c, gather(),
 * merge() and take_one() in nsn_session_receive.c, nsn_in_link): a publisher sends each message to a relay and to an observer;
 * the relay answers each one with a message to the observer. Which of the two the publisher writes to first follows from their
 * slots: both ways are searched. Its link to the observer is new, and comes through nsnd at some time. Each time it looks, the
 * observer reads the clock and goes by stamps, or does without because only one link has something.
 *
 * Holds: the observer dispatches no answer before the message that it answers.
 * Take out: NO_ANNOUNCEMENT (that a message is under way, before the first link is written to), NO_PUBLISHING (the publisher's
 * word is not looked at: what is under way is not waited for), NO_CLOCK (what was stamped after the clock was read is
 * dispatched too), NO_STAMPS (links are served one after the other), NO_LINK_WAIT (a link that the board announces is not
 * waited for), ONE_LINK_IS_FREE (with one link at the observer the clock does not count), LINK_TAKES_WORD (a link that comes
 * takes the board's word as seen, also when that says that a message is under way), NO_SECOND_WORD (the word that stands on the
 * board when a publish was found to be over is taken as final); and without the clock NO_SECOND_LOOK (the other word is not
 * looked at behind the tail), UNDER_WAY_IS_SEEN (a word that says that a message is under way is taken as seen). */
#define MESSAGES 2

#define PUBLISHING 0 /* the publisher's */
#define TO_RELAY 1 /* tail of the publisher's link to the relay */
#define TAIL(from) (2 + from) /* of the links to the observer */
#define BOARD(from) (4 + from) /* the observer's: twice the tail, and 1 while a message is under way */
#define CELLS 6
#define WRITERS 2
#define DEPTH 3
#include "tso.pml"

#define PUBLISHER 0
#define RELAY 1

#define STAMP(from, number) stamps[MESSAGES * from + number]
byte stamps[2 * MESSAGES]; /* of the records: in the links before their tails say so, so nobody reads them earlier */
byte clock;
bool link_sent, link_there, observer_first, relay_is_below;

inline to_observer(from)
{
    atomic { STAMP(from, number) = stamp; number++; STORE(from, TAIL(from), number) }
    STORE(from, BOARD(from), number << 1)
}

proctype publisher()
{
    byte number, stamp;
    do
    :: number < MESSAGES ->
        atomic { clock++; stamp = clock; STORE(PUBLISHER, PUBLISHING, stamp) }
        atomic { FENCE(PUBLISHER); link_sent = true } /* out_make, the first time */
        if
        :: observer_first ->
            to_observer(PUBLISHER);
            STORE(PUBLISHER, TO_RELAY, number)
        :: else ->
#ifndef NO_ANNOUNCEMENT
            STORE(PUBLISHER, BOARD(PUBLISHER), number << 1 | 1);
#endif
            STORE(PUBLISHER, TO_RELAY, number + 1);
            to_observer(PUBLISHER)
        fi;
        atomic { STORE(PUBLISHER, PUBLISHING, 0); stamp = 0 }
    :: else -> break
    od
}

proctype relay()
{
    byte number, stamp;
    do
    :: number < MESSAGES ->
        memory[TO_RELAY] > number;
        atomic { clock++; stamp = clock }
        to_observer(RELAY);
        stamp = 0
    :: else -> break
    od
}

proctype nsnd() { link_sent -> link_there = true }

inline look_at_publisher()
{
    word = memory[BOARD(PUBLISHER)];
    if
    :: word == seen[PUBLISHER]
    :: word != seen[PUBLISHER] && !linked -> announced = true
    :: word != seen[PUBLISHER] && linked ->
        listed[PUBLISHER] = true;
#ifndef NO_PUBLISHING
        do
        :: (word & 1) && word != last ->
            inside = memory[PUBLISHING];
            if
            :: inside ->
                atomic { latest = (inside < latest -> inside : latest); word = seen[PUBLISHER] } /* looked at again */
                break
            :: else ->
                last = word;
                word = memory[BOARD(PUBLISHER)]; /* the publish was over: final, or the next one's */
#ifdef NO_SECOND_WORD
                break
#endif
            fi
        :: else -> break
        od;
#endif
        seen[PUBLISHER] = word
    fi;
    atomic { word = 0; last = 0; inside = 0 }
}

inline look_at_relay()
{
    atomic {
        listed[RELAY] = listed[RELAY] || memory[BOARD(RELAY)] != seen[RELAY];
        seen[RELAY] = memory[BOARD(RELAY)]
    }
}

/* nsn_link_in_stamp */
inline next(from)
{
    atomic {
        if
        :: memory[TAIL(from)] > head[from] -> stamp[from] = STAMP(from, head[from])
        :: else -> stamp[from] = 255
        fi
    }
}

#ifdef NO_STAMPS
#define COMES_BEFORE(from, other) true
#else
#define COMES_BEFORE(from, other) (stamp[from] < stamp[other])
#endif

inline gather(from)
{
    if
    :: listed[from] ->
        next(from);
        listed[from] = stamp[from] != 255
    :: else -> stamp[from] = 255
    fi
}

#ifdef UNDER_WAY_IS_SEEN
#define IS_PLAIN(word) true
#else
#define IS_PLAIN(word) !(word & 1)
#endif

inline is_quiet(other)
{
    quiet = memory[BOARD(other)] == seen[other]
}

/* nsn_look_for_one, take_one */
inline without_the_clock(from, other)
{
    word = memory[BOARD(from)];
    if
    :: !listed[other] && (word == seen[from] || ((from == RELAY || linked) && IS_PLAIN(word))) ->
        atomic { listed[from] = listed[from] || word != seen[from]; seen[from] = word }
        if
        :: listed[from] ->
#ifdef NO_SECOND_LOOK
            is_quiet(other);
            latest = memory[TAIL(from)];
#else
            latest = memory[TAIL(from)];
            is_quiet(other);
#endif
            do
            :: quiet && head[from] < latest ->
                atomic { head[from]++; assert(from == PUBLISHER || head[PUBLISHER] >= head[RELAY]) }
            :: else -> break
            od;
            atomic { listed[from] = !quiet; quiet = false }
        :: else
        fi
    :: else
    fi;
    atomic { word = 0; latest = 0 }
}

proctype observer()
{
    byte seen[2], head[2], stamp[2], word, last, inside, latest;
    bool listed[2], linked, announced, quiet;
    do
    :: head[RELAY] < MESSAGES ->
        if /* nsn_control_receive */
        :: atomic { link_there && !linked -> linked = true; listed[PUBLISHER] = true }
#ifdef LINK_TAKES_WORD
            seen[PUBLISHER] = memory[BOARD(PUBLISHER)]
#endif
        :: true
        fi;
        if
        :: without_the_clock(PUBLISHER, RELAY)
        :: without_the_clock(RELAY, PUBLISHER)
        :: true
        fi;
        latest = clock;
        if
        :: relay_is_below -> look_at_relay(); look_at_publisher()
        :: else -> look_at_publisher(); look_at_relay()
        fi;
#ifdef NO_LINK_WAIT
        announced = false;
#endif
#ifdef NO_CLOCK
        latest = 254;
#endif
#ifdef ONE_LINK_IS_FREE
        latest = (linked -> latest : 254);
#endif
        if
        :: !announced ->
            gather(PUBLISHER);
            gather(RELAY);
            do /* merge */
            :: stamp[PUBLISHER] <= latest && COMES_BEFORE(PUBLISHER, RELAY) -> head[PUBLISHER]++; next(PUBLISHER)
            :: stamp[RELAY] <= latest && COMES_BEFORE(RELAY, PUBLISHER) ->
                atomic { head[RELAY]++; assert(head[PUBLISHER] >= head[RELAY]) }
                next(RELAY)
            :: else -> break
            od
        :: else
        fi;
        atomic { announced = false; latest = 0; stamp[0] = 0; stamp[1] = 0 }
    :: else -> break
    od
}

init
{
    atomic {
        if
        :: observer_first = true
        :: relay_is_below = true
        :: skip
        fi;
        run buffer(PUBLISHER); run buffer(RELAY);
        run publisher(); run relay(); run nsnd(); run observer()
    }
}
