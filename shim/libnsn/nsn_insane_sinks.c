/* Sinks: consuming from their queues, and the thread that calls their callbacks. */
#include <errno.h>
#include <signal.h>
#include <string.h>

#include "nsn_insane_internal.h"

#define SETTLE_NS (5 * NSN_SECOND_NS)

static int no_sink(void)
{
    return nsn_insane_fail(-EBADF, "there is no such sink: it was destroyed, or never created");
}

/* --- creating and destroying -------------------------------------------------------------------------------------- */

int nsn_sink_subscribe(struct nsn_insane *insane, const struct nsn_thing *sink)
{
    char subject[24];
    int length = snprintf(subject, sizeof subject, "$INSANE.%u", sink->sink.channel);
    return nsn_subscribe(insane->session, sink->handle, subject, (size_t)length, "", 0);
}

/* Until every emission that begins from now on reaches the sink. While nsnd is gone there is nothing to wait for. */
static int settle(struct nsn_insane *insane, const struct nsn_thing *sink)
{
    uint64_t deadline = nsn_now_ns() + SETTLE_NS;
    nsn_session_process(insane->session, 0);
    while (!nsn_interest_settled(insane->session, 100000)) {
        nsn_insane_attend(insane, true);
        if (nsn_session_state(insane->session) != NSN_READY)
            return 0;
        if (sink->sink.refused)
            return nsn_insane_fail(sink->sink.refused, "%s", nsn_session_error(insane->session));
        if (nsn_now_ns() > deadline)
            return nsn_insane_fail(-ETIMEDOUT, "nsnd did not take a subscription within %d s: is it stopped or overloaded?",
                                   (int)(SETTLE_NS / NSN_SECOND_NS));
    }
    return 0;
}

void nsn_sink_empty(struct nsn_insane *insane, struct nsn_sink *sink)
{
    while (sink->first) {
        struct nsn_loan *loan = sink->first;
        sink->first = loan->next;
        nsn_loan_release(insane, loan);
    }
    sink->last = &sink->first;
    sink->count = 0;
    sink->bytes = 0;
}

static void remove_sink(struct nsn_insane *insane, struct nsn_thing *thing)
{
    nsn_unsubscribe(insane->session, thing->handle, 0);
    nsn_session_process(insane->session, 0);
    nsn_sink_empty(insane, &thing->sink);
    struct nsn_sink **at = &insane->ready;
    while (*at && *at != &thing->sink)
        at = &(*at)->next_ready;
    if (*at) {
        *at = thing->sink.next_ready;
        if (insane->ready_last == &thing->sink.next_ready)
            insane->ready_last = at;
    }
    nsn_things_remove(&insane->sinks, thing);
}

static int create_sink(struct nsn_insane *insane, uint32_t stream, uint32_t channel, void *callback, uint32_t *handle)
{
    const struct nsn_thing *of = nsn_things_find(&insane->streams, stream);
    if (!of)
        return nsn_insane_fail(-EBADF, "there is no such stream to make a sink on");
    struct nsn_thing *thing = nsn_things_add(&insane->sinks);
    if (!thing)
        return nsn_insane_fail(-EMFILE, "a session has at most %u sinks, or there is no memory: destroy some",
                               NSN_THINGS_MAX);
    struct nsn_sink *sink = &thing->sink;
    *sink = (struct nsn_sink){.stream = stream, .channel = channel, .consumption = of->stream.options.consumption,
                              .callback = callback, .last = &sink->first};
    int result = nsn_sink_subscribe(insane, thing);
    if (result < 0)
        result = nsn_insane_fail(result, "%s", nsn_session_error(insane->session));
    else
        result = settle(insane, thing);
    if (result == 0 && callback)
        result = nsn_callbacks_start(insane);
    if (result < 0)
        remove_sink(insane, thing);
    else
        *handle = thing->handle;
    return result;
}

int nsn_insane_create_sink(struct nsn_insane *insane, uint32_t stream, uint32_t channel, void *callback, uint32_t *handle)
{
    int result = nsn_insane_check(insane);
    if (result < 0)
        return result;
    if (channel == UINT32_MAX)
        return nsn_insane_fail(-EINVAL, "a channel's number is at most %u", UINT32_MAX - 1);
    nsn_insane_lock(insane);
    result = create_sink(insane, stream, channel, callback, handle);
    if (result == 0 && callback)
        nsn_insane_wake_all(insane); /* who leads may have slept by another policy than the callbacks' */
    nsn_insane_unlock(insane);
    return result;
}

int nsn_insane_destroy_sink(struct nsn_insane *insane, uint32_t handle)
{
    int result = nsn_insane_check(insane);
    if (result < 0)
        return result;
    nsn_insane_lock(insane);
    struct nsn_thing *thing = nsn_things_find(&insane->sinks, handle);
    if (thing) {
        struct nsn_sink *sink = &thing->sink;
        bool own = sink->calling && pthread_equal(sink->caller, pthread_self());
        sink->callback = own || !sink->calling ? sink->callback : NULL;
        while (sink->calling && !own)
            nsn_insane_follow(insane, UINT64_MAX);
        if (nsn_things_find(&insane->sinks, handle) == thing)
            remove_sink(insane, thing);
        nsn_insane_wake_all(insane);
    }
    nsn_insane_unlock(insane);
    return thing ? 0 : no_sink();
}

/* --- consuming ---------------------------------------------------------------------------------------------------- */

static struct nsn_loan *pop(struct nsn_sink *sink)
{
    struct nsn_loan *loan = sink->first;
    sink->first = loan->next;
    if (!sink->first)
        sink->last = &sink->first;
    sink->count--;
    sink->bytes -= loan->capacity;
    return loan;
}

/* Waits, with the lock held, until the sink has a message. */
static int await(struct nsn_insane *insane, uint32_t handle, uint64_t wait_ns, uint64_t since, struct nsn_sink **sink)
{
    struct nsn_thing *thing = nsn_things_find(&insane->sinks, handle);
    if (!thing)
        return no_sink();
    *sink = &thing->sink;
    if ((*sink)->callback)
        return nsn_insane_fail(-EINVAL, "the sink's messages go to its callback");
    if ((*sink)->first || nsn_insane_take(insane, false))
        if ((*sink)->first)
            return 0;
    uint64_t now = nsn_now_ns();
    if (!wait_ns) {
        if (now >= insane->attend_at) {
            nsn_insane_attend(insane, false);
            insane->attend_at = now + NSN_ATTEND_NS;
        }
        return nsn_insane_fail(-EAGAIN, "there is no message");
    }
    uint64_t deadline = wait_ns > UINT64_MAX - now ? UINT64_MAX : now + wait_ns;
    int result = 0;
    while (result == 0 && !(*sink)->first) {
        result = nsn_insane_wait(insane, (*sink)->consumption, deadline, since ? since : now);
        thing = nsn_things_find(&insane->sinks, handle);
        if (!thing)
            return nsn_insane_fail(-ESHUTDOWN, "the sink was destroyed by another thread");
        if (result == 0 && !(*sink)->first && nsn_now_ns() >= deadline)
            result = nsn_insane_fail(-ETIMEDOUT, "no message came within %.3f s", (double)wait_ns / 1e9);
    }
    if ((*sink)->first)
        return 0;
    return result == -EINTR ? nsn_insane_fail(-EINTR, "a signal handler was called") : result;
}

int nsn_insane_consume(struct nsn_insane *insane, uint32_t handle, uint64_t wait_ns, uint64_t since_ns,
                       struct nsn_buffer **buffer)
{
    int result = nsn_insane_check(insane);
    if (result < 0)
        return result;
    struct nsn_sink *sink;
    nsn_insane_lock(insane);
    result = await(insane, handle, wait_ns, since_ns, &sink);
    if (result == 0)
        *buffer = &pop(sink)->buffer;
    nsn_insane_unlock(insane);
    return result;
}

int nsn_insane_available(struct nsn_insane *insane, uint32_t handle, uint64_t wait_ns)
{
    int result = nsn_insane_check(insane);
    if (result < 0)
        return result;
    struct nsn_sink *sink;
    nsn_insane_lock(insane);
    result = await(insane, handle, wait_ns, 0, &sink);
    if (result == 0)
        result = (int)sink->count;
    nsn_insane_unlock(insane);
    return result == -EAGAIN ? 0 : result;
}

uint64_t nsn_insane_dropped(struct nsn_insane *insane, uint32_t handle)
{
    if (nsn_insane_check(insane) < 0)
        return 0;
    nsn_insane_lock(insane);
    struct nsn_thing *thing = nsn_things_find(&insane->sinks, handle);
    uint64_t dropped = thing ? thing->sink.dropped : 0;
    nsn_insane_unlock(insane);
    return dropped;
}

/* --- callbacks ---------------------------------------------------------------------------------------------------- */

/* How eager the thread waits: as the most eager of the sinks that it serves. */
static int consumption_of_all(struct nsn_insane *insane)
{
    int most = NSN_QOS_CONSUMPTION_LOW;
    struct nsn_thing *thing;
    for (uint32_t place = 0; (thing = nsn_things_next(&insane->sinks, &place));) {
        int one = thing->sink.callback ? thing->sink.consumption : NSN_QOS_CONSUMPTION_LOW;
        if (one == NSN_QOS_CONSUMPTION_POLL || most == NSN_QOS_CONSUMPTION_LOW)
            most = one;
    }
    return most;
}

static void call(struct nsn_insane *insane, struct nsn_sink *sink)
{
    struct nsn_thing *thing = (struct nsn_thing *)((char *)sink - offsetof(struct nsn_thing, sink));
    uint32_t handle = thing->handle;
    insane->ready = sink->next_ready;
    if (!insane->ready)
        insane->ready_last = &insane->ready;
    sink->listed = false;
    while (sink->first && sink->callback && !insane->shut_down) {
        nsn_data_cb callback = __extension__(nsn_data_cb)sink->callback;
        struct nsn_loan *loan = pop(sink);
        sink->calling = true;
        sink->caller = pthread_self();
        nsn_insane_unlock(insane);
        callback(handle, &loan->buffer);
        nsn_insane_lock(insane);
        sink->calling = false;
        if (!sink->callback)
            nsn_insane_wake_all(insane); /* nsn_insane_destroy_sink() waits for this */
        if (nsn_things_find(&insane->sinks, handle) != thing)
            return; /* it was destroyed by its callback */
    }
}

static void *call_back(void *context)
{
    struct nsn_insane *insane = context;
    nsn_insane_lock(insane);
    while (!insane->shut_down) {
        if (insane->ready)
            call(insane, insane->ready);
        else
            nsn_insane_wait(insane, consumption_of_all(insane), UINT64_MAX, nsn_now_ns());
    }
    nsn_insane_unlock(insane);
    return NULL;
}

int nsn_callbacks_start(struct nsn_insane *insane)
{
    if (insane->calling)
        return 0;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&insane->caller, NULL, call_back, insane);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error)
        return nsn_insane_fail(-error, "no thread for callbacks: %s", strerror(error));
    insane->calling = true;
    return 0;
}

void nsn_callbacks_end(struct nsn_insane *insane)
{
    if (insane->calling)
        pthread_join(insane->caller, NULL);
    insane->calling = false;
}
