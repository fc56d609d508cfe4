/* Handing a link over (hand_over() and nsn_out_resend in nsn_session_out.c, nsn_in_link, nsn_control_receive;
 * nsnd/sessions.py): the producer writes into its link at once and hands it to nsnd, which passes it on; the consumer answers
 * that it has taken it. nsnd is killed at any step, twice, and restarted. What it sent before its end may still be read by the
 * consumer, or be lost. Once nsnd, and once the consumer, has no room for a descriptor that comes: it ends the connection.
 *
 * Holds: each message is dispatched exactly once, by one mapping, and the producer's close ends. What stays away is an invalid
 * end state.
 * Take out: NO_IDENTITY (a link that comes again is not recognised), NO_RESEND (at reattachment), NSND_TAKES (the producer
 * counts the link as taken when nsnd has it), NO_TAKE_OVER (a new nsnd does not know the sessions that have not come back),
 * NO_RESUME (nsnd does not send again what the consumer has not answered when it reattaches), ANSWER_ANYWAY (the consumer
 * answers, and keeps its connection, when it had no room for the descriptor). */
#define MESSAGES 2
#define KILLS 2

chan to_nsnd = [2] of { bit };
chan to_consumer = [2] of { bit };
chan answers = [2] of { bit };

bool up = true, producer_attached = true, consumer_attached = true;
bool consumer_known = true, in_flight; /* nsnd's */
bool taken; /* the consumer's word in the link; the producer closes the descriptor when it sees it */
byte waiting; /* links that wait at nsnd for the consumer */
byte kills, tail; /* tail: the link's */

#ifdef NSND_TAKES
bool with_nsnd;
#define TAKEN with_nsnd
#else
#define TAKEN taken
#endif

inline empty_out(channel)
{
    do
    :: nempty(channel) -> channel ? _
    :: empty(channel) -> break
    od
}

inline hand_over()
{
    if
    :: producer_attached && !TAKEN -> to_nsnd ! 1
    :: else
    fi
}

proctype producer()
{
    do
    :: atomic { tail == 0 -> hand_over(); tail++ } /* out_make, and the first message */
    :: atomic { tail > 0 && tail < MESSAGES -> tail++ }
    :: atomic {
        up && !producer_attached ->
            producer_attached = true;
#ifndef NO_RESEND
            if
            :: tail -> hand_over()
            :: else
            fi
#endif
       }
    :: atomic { tail == MESSAGES && taken -> break }
    od
}

proctype nsnd()
{
    bool lost;
end:
    do
    :: atomic { up && nempty(to_nsnd) && !lost -> lost = true; producer_attached = false; empty_out(to_nsnd) }
    :: atomic {
        up && nempty(to_nsnd) ->
            to_nsnd ? _;
            if
            :: consumer_known -> waiting++
            :: !consumer_known /* "gone", the producer hears */
            fi;
#ifdef NSND_TAKES
            with_nsnd = true
#endif
       }
    :: atomic { up && waiting && consumer_attached && !in_flight -> waiting--; in_flight = true; to_consumer ! 1 }
    :: atomic { up && nempty(answers) -> answers ? _; assert(in_flight); in_flight = false } /* else it refuses the session */
    od
}

proctype killer()
{
    do
    :: atomic {
        kills < KILLS ->
            kills++;
            up = false;
            producer_attached = false;
            consumer_attached = false;
            waiting = 0;
            in_flight = false;
            empty_out(to_nsnd);
            empty_out(answers);
            if
            :: empty_out(to_consumer)
            :: true
            fi;
#ifdef NO_TAKE_OVER
            consumer_known = false;
#endif
       }
        up = true
    :: break
    od
}

inline reattach()
{
    consumer_attached = true;
    consumer_known = true;
#ifndef NO_RESUME
    waiting = waiting + in_flight;
#endif
    in_flight = false
}

/* nsn_in_link: a mapping begins to read at the front. */
inline map()
{
    if
#ifndef NO_IDENTITY
    :: mapped
#endif
    :: else ->
        mapped = true;
        head = 0;
        taken = true
    fi
}

inline answer()
{
    if
    :: consumer_attached -> answers ! 1
    :: else
    fi
}

proctype consumer()
{
    byte dispatched[MESSAGES], head;
    bool mapped, lost;
    do
    :: atomic { nempty(to_consumer) -> to_consumer ? _; map(); answer() }
    :: atomic {
        nempty(to_consumer) && !lost ->
            to_consumer ? _;
            lost = true;
#ifdef ANSWER_ANYWAY
            answer()
#else
            if
            :: consumer_attached -> consumer_attached = false; empty_out(answers)
            :: else
            fi;
            empty_out(to_consumer)
#endif
       }
    :: atomic { up && !consumer_attached && empty(to_consumer) -> reattach() }
    :: atomic { mapped && head < tail -> dispatched[head]++; assert(dispatched[head] == 1); head++ }
    :: head == MESSAGES -> break
    od;
end:
    do /* it lives on, and nothing comes twice */
    :: atomic { nempty(to_consumer) -> to_consumer ? _; map(); answer(); assert(head == MESSAGES) }
    :: atomic { up && !consumer_attached && empty(to_consumer) -> reattach() }
    od
}

init { atomic { run producer(); run nsnd(); run consumer(); run killer() } }
