/* Streams and sources, and emitting buffers. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nsn_insane_internal.h"
#include "nsn_link.h"

#define ATTEND_EMISSIONS 64       /* a program that only emits looks after nsnd that often */
#define SETTLE_NS (2 * NSN_SECOND_NS)
#define LOOK_AGAIN_NS 5000000ull  /* memory may be there without anybody ringing */

/* --- streams and sources ------------------------------------------------------------------------------------------ */

static int full(const char *what)
{
    return nsn_insane_fail(-EMFILE, "a session has at most %u %s, or there is no memory: destroy some", NSN_THINGS_MAX, what);
}

int nsn_insane_create_stream(struct nsn_insane *insane, const struct nsn_options *options, uint32_t *handle)
{
    int result = nsn_insane_check(insane);
    if (result < 0)
        return result;
    if (options->datapath < 0 || options->datapath > NSN_QOS_DATAPATH_FAST || options->consumption < 0 ||
        options->consumption > NSN_QOS_CONSUMPTION_ADAPTIVE || options->determinism < 0 ||
        options->determinism > NSN_QOS_DETERMINISM_TIMESENSITIVE || options->reliability < 0 ||
        options->reliability > NSN_QOS_RELIABILITY_RELIABLE)
        return nsn_insane_fail(-EINVAL, "a stream's options are datapath %d, consumption %d, determinism %d, reliability %d: "
                               "one of them is none of the NSN_QOS_ constants (is the struct initialised?)", options->datapath,
                               options->consumption, options->determinism, options->reliability);
    nsn_insane_lock(insane);
    struct nsn_thing *thing = nsn_things_add(&insane->streams);
    if (thing) {
        thing->stream.options = *options;
        *handle = thing->handle;
    }
    nsn_insane_unlock(insane);
    return thing ? 0 : full("streams");
}

/* With the lock held: the first sink or source of a stream, 0 when there is none. */
static uint32_t first_of(const struct nsn_things *things, uint32_t stream, bool sinks)
{
    struct nsn_thing *thing;
    for (uint32_t place = 0; (thing = nsn_things_next(things, &place));)
        if ((sinks ? thing->sink.stream : thing->source.stream) == stream)
            return thing->handle;
    return 0;
}

int nsn_insane_destroy_stream(struct nsn_insane *insane, uint32_t stream)
{
    int result = nsn_insane_check(insane);
    if (result < 0)
        return result;
    for (uint32_t sink = 1, source = 1; sink || source;) {
        nsn_insane_lock(insane);
        struct nsn_thing *thing = nsn_things_find(&insane->streams, stream);
        if (!thing) {
            nsn_insane_unlock(insane);
            return nsn_insane_fail(-EBADF, "there is no such stream: it was destroyed, or never created");
        }
        sink = first_of(&insane->sinks, stream, true);
        source = first_of(&insane->sources, stream, false);
        if (!sink && !source)
            nsn_things_remove(&insane->streams, thing);
        nsn_insane_unlock(insane);
        if (sink)
            nsn_insane_destroy_sink(insane, sink);
        if (source)
            nsn_insane_destroy_source(insane, source);
    }
    return 0;
}

int nsn_insane_create_source(struct nsn_insane *insane, uint32_t stream, uint32_t channel, uint32_t *handle)
{
    int result = nsn_insane_check(insane);
    if (result < 0)
        return result;
    if (channel == UINT32_MAX)
        return nsn_insane_fail(-EINVAL, "a channel's number is at most %u", UINT32_MAX - 1);
    nsn_insane_lock(insane);
    const struct nsn_thing *of = nsn_things_find(&insane->streams, stream);
    struct nsn_thing *thing = of ? nsn_things_add(&insane->sources) : NULL;
    if (thing) {
        thing->source.stream = stream;
        thing->source.unreliable = of->stream.options.reliability == NSN_QOS_RELIABILITY_UNRELIABLE;
        int length = snprintf(thing->source.subject, sizeof thing->source.subject, "$INSANE.%u", channel);
        thing->source.subject_length = (uint8_t)length;
        *handle = thing->handle;
    }
    nsn_insane_unlock(insane);
    if (!of)
        return nsn_insane_fail(-EBADF, "there is no such stream to make a source on");
    return thing ? 0 : full("sources");
}

int nsn_insane_destroy_source(struct nsn_insane *insane, uint32_t source)
{
    int result = nsn_insane_check(insane);
    if (result < 0)
        return result;
    nsn_insane_lock(insane);
    struct nsn_thing *thing = nsn_things_find(&insane->sources, source);
    if (thing)
        nsn_things_remove(&insane->sources, thing);
    nsn_insane_unlock(insane);
    return thing ? 0 : nsn_insane_fail(-EBADF, "there is no such source: it was destroyed, or never created");
}

/* --- buffers ------------------------------------------------------------------------------------------------------ */

/* Waits a little for room in links or memory, receiving meanwhile: two that both emit must not wait for each other. */
static int wait_for_room(struct nsn_insane *insane, uint64_t deadline, uint64_t since)
{
    nsn_insane_lock(insane);
    uint64_t until = nsn_now_ns() + LOOK_AGAIN_NS;
    nsn_insane_attend(insane, true);
    int result = nsn_space(insane->session) ? 0 : nsn_insane_wait(insane, NSN_QOS_CONSUMPTION_LOW,
                                                                  until < deadline ? until : deadline, since);
    nsn_insane_unlock(insane);
    return result == -ENOTCONN ? 0 : result; /* links that are full empty without nsnd */
}

static int take_block(struct nsn_insane *insane, uint64_t size, uint64_t wait_ns, struct nsn_loan *loan)
{
    uint64_t since = nsn_now_ns(), deadline = wait_ns > UINT64_MAX - since ? UINT64_MAX : since + wait_ns;
    for (;;) {
        int result = nsn_buffer_take(insane->session, size, &loan->block);
        if (result != -EAGAIN)
            return result < 0 ? nsn_insane_fail(result, "%s", nsn_session_error(insane->session)) : 0;
        if (nsn_now_ns() >= deadline)
            return nsn_insane_fail(-EAGAIN, "there is no memory for %llu bytes until readers release what was emitted before",
                                   (unsigned long long)size);
        result = wait_for_room(insane, deadline, since);
        if (result < 0)
            return result;
    }
}

static int too_large(const struct nsn_insane *insane, uint64_t size)
{
    return nsn_insane_fail(-EMSGSIZE, "%llu bytes are more than the node's max_payload of %llu: emit them in parts, or raise "
                           "max_payload in nsnd.cfg", (unsigned long long)size, (unsigned long long)insane->max_payload);
}

int nsn_insane_get_buffer(struct nsn_insane *insane, uint64_t size, uint64_t wait_ns, struct nsn_buffer **buffer)
{
    int result = nsn_insane_check(insane);
    if (result < 0)
        return result;
    if (size > insane->max_payload)
        return too_large(insane, size);
    bool large = size > NSN_INLINE_MAX;
    struct nsn_loan *loan = nsn_loan_take(insane, large ? UINT64_MAX : size);
    if (!loan)
        return nsn_insane_fail(-ENOMEM, "no memory for a buffer of %llu bytes", (unsigned long long)size);
    if (large) {
        result = take_block(insane, size, wait_ns, loan);
        if (result < 0) {
            nsn_loan_give(loan);
            return result;
        }
        loan->kind = NSN_LOAN_BLOCK;
        loan->data = loan->block.data;
        loan->capacity = loan->block.capacity;
    }
    loan->buffer.data = loan->data;
    loan->buffer.len = size;
    *buffer = &loan->buffer;
    return 0;
}

static int not_out(void)
{
    return nsn_insane_fail(-EINVAL, "that is no buffer that this program holds: it was released or emitted before, or is not "
                           "from nsn_get_buffer or nsn_consume_data");
}

int nsn_insane_release(struct nsn_insane *insane, struct nsn_buffer *buffer)
{
    int result = nsn_insane_check(insane);
    if (result < 0)
        return result;
    struct nsn_loan *loan = buffer ? nsn_loan_find(insane, buffer) : NULL;
    if (!loan)
        return not_out();
    nsn_loan_release(insane, loan);
    return 1;
}

/* --- emitting ----------------------------------------------------------------------------------------------------- */

/* Sinks that were created a moment ago are to be known before what is emitted now. */
static void settle(struct nsn_insane *insane)
{
    uint64_t deadline = nsn_now_ns() + SETTLE_NS;
    while (!nsn_interest_settled(insane->session, 100000) && nsn_now_ns() < deadline) {
        nsn_insane_lock(insane);
        nsn_insane_attend(insane, true);
        bool attached = nsn_session_state(insane->session) == NSN_READY;
        nsn_insane_unlock(insane);
        if (!attached)
            return;
    }
}

/* What to do after a negative result: 0, emit again; else the emission is over. */
static int overcome(struct nsn_insane *insane, int error, uint64_t *deadline, uint64_t *since)
{
    if (error == -EALREADY) {
        settle(insane);
        return 0;
    }
    if (error != -EAGAIN)
        return nsn_insane_fail(error, "%s", nsn_session_error(insane->session));
    uint64_t now = nsn_now_ns();
    if (!*since)
        *since = now;
    if (!*deadline)
        *deadline = now + insane->write_deadline_ns;
    if (now >= *deadline) {
        nsn_publish_give_up(insane->session);
        return 0;
    }
    return wait_for_room(insane, *deadline, *since);
}

/* Returns the token. */
static int note_outcome(struct nsn_source *source, int outcome)
{
    uint32_t token = __atomic_add_fetch(&source->next_token, 1, __ATOMIC_RELAXED) & INT32_MAX;
    __atomic_store_n(&source->outcomes[token % NSN_OUTCOMES], (uint64_t)token << 32 | (uint32_t)outcome, __ATOMIC_RELAXED);
    return (int)token;
}

/* Returns the token. */
static int emit(struct nsn_insane *insane, uint32_t handle, struct nsn_emission *emission, uint64_t deadline)
{
    struct nsn_thing *thing = nsn_things_find(&insane->sources, handle);
    if (!thing)
        return nsn_insane_fail(-EBADF, "there is no such source: it was destroyed, or never created");
    struct nsn_source *source = &thing->source;
    emission->subject = source->subject;
    emission->subject_length = source->subject_length;
    emission->unreliable = source->unreliable;
    uint32_t emitted = __atomic_load_n(&source->next_token, __ATOMIC_RELAXED);
    if (emitted % ATTEND_EMISSIONS == 0 || nsn_session_state(insane->session) != NSN_READY) {
        nsn_insane_lock(insane);
        nsn_insane_attend(insane, false);
        nsn_insane_unlock(insane);
    }
    uint64_t since = 0;
    int result;
    while ((result = nsn_emit(insane->session, emission)) < 0) {
        if (result == -EAGAIN && source->unreliable)
            return nsn_insane_fail(result, "there is no memory for a copy of the message, and an unreliable stream does not "
                                   "wait");
        if ((result = overcome(insane, result, &deadline, &since)) < 0)
            return result;
    }
    return note_outcome(source, emission->dropped ? -ENOBUFS : result); /* behind it: a locked instruction takes its time */
}

int nsn_insane_emit(struct nsn_insane *insane, uint32_t source, struct nsn_buffer *buffer, uint64_t deadline)
{
    int result = nsn_insane_check(insane);
    if (result < 0)
        return result;
    struct nsn_loan *loan = buffer ? nsn_loan_find(insane, buffer) : NULL;
    if (!loan)
        return not_out();
    if (buffer->len > loan->capacity)
        return nsn_insane_fail(-EMSGSIZE, "len is %zu, and the buffer has %llu bytes", buffer->len,
                               (unsigned long long)loan->capacity);
    struct nsn_emission emission = {.payload = loan->data, .length = buffer->len,
                                    .buffer = loan->kind == NSN_LOAN_BLOCK ? &loan->block : NULL};
    result = emit(insane, source, &emission, deadline);
    if (result >= 0)
        nsn_loan_release(insane, loan);
    return result;
}

int nsn_insane_send(struct nsn_insane *insane, uint32_t source, const uint8_t *bytes, uint64_t length, uint64_t deadline)
{
    int result = nsn_insane_check(insane);
    if (result < 0)
        return result;
    if (length > insane->max_payload)
        return too_large(insane, length);
    struct nsn_emission emission = {.payload = bytes, .length = length};
    return emit(insane, source, &emission, deadline);
}

int nsn_insane_outcome(struct nsn_insane *insane, uint32_t handle, int token)
{
    int result = nsn_insane_check(insane);
    if (result < 0)
        return result;
    struct nsn_thing *thing = nsn_things_find(&insane->sources, handle);
    if (!thing)
        return nsn_insane_fail(-EBADF, "there is no such source: it was destroyed, or never created");
    uint64_t *place = &thing->source.outcomes[(uint32_t)token % NSN_OUTCOMES], kept = __atomic_load_n(place, __ATOMIC_RELAXED);
    if (token <= 0 || kept >> 32 != (uint32_t)token)
        return nsn_insane_fail(-ENOENT, "%d is none of the source's last %u emissions", token, NSN_OUTCOMES);
    int outcome = (int32_t)(uint32_t)kept;
    return outcome < 0 ? nsn_insane_fail(outcome, "at least one sink had no room and lost the message") : outcome;
}
