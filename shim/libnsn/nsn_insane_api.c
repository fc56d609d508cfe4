/* nsn/nsn.h: INSANE's primitives on the one session of the program. */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nsn_insane_internal.h"

#define CLOSE_NS (2 * NSN_SECOND_NS)

static struct {
    pthread_mutex_t lock;         /* of nsn_init and nsn_close */
    struct nsn_insane *insane;
    int log_level;
} program = {.lock = PTHREAD_MUTEX_INITIALIZER};

static _Thread_local nsn_buffer_t invalid;

static void say(int level, const char *words)
{
    if (program.log_level >= level)
        fprintf(stderr, "insane_nats: %s\n", words);
}

/* The session, or NULL with words. Pairs with the store in nsn_init(). */
static struct nsn_insane *session(void)
{
    struct nsn_insane *insane = __atomic_load_n(&program.insane, __ATOMIC_ACQUIRE);
    if (!insane)
        nsn_insane_fail(-ENOTCONN, "there is no session: call nsn_init() first");
    return insane;
}

static void pass_warning_on(struct nsn_insane *insane)
{
    char text[NSN_INSANE_WORDS];
    if (nsn_insane_warning(insane, text, sizeof text))
        say(NSN_LOG_WARN, text);
}

/* The result of setting something up: failures are told. */
static int told(const char *function, int result)
{
    if (result < 0) {
        char text[NSN_INSANE_WORDS + 64];
        snprintf(text, sizeof text, "%s: %s", function, nsn_insane_error());
        say(NSN_LOG_ERROR, text);
    }
    return result;
}

static nsn_buffer_t *no_buffer(int error)
{
    invalid = (nsn_buffer_t){.index = (size_t)-error};
    errno = -error;
    return &invalid;
}

const char *nsn_error_text(void) { return nsn_insane_error(); }

/* --- the session -------------------------------------------------------------------------------------------------- */

static const char *given(const char *text) { return *text ? text : NULL; }

static int open_program(void)
{
    struct nsn_app_config config;
    program.log_level = NSN_LOG_WARN;
    int result = nsn_app_config_read(NULL, &config);
    if (result < 0)
        return result;
    program.log_level = config.log_level;
    struct nsn_insane_options options = {.application_id = config.application_id, .echo = config.echo,
                                         .name = program_invocation_short_name, .user = given(config.user),
                                         .password = given(config.password), .token = given(config.token)};
    struct nsn_insane *insane = nsn_insane_open(&options);
    if (!insane)
        return -errno;
    __atomic_store_n(&program.insane, insane, __ATOMIC_RELEASE); /* pairs with session() */
    return 0;
}

int nsn_init(void)
{
    pthread_mutex_lock(&program.lock);
    int result = 0;
    if (program.insane && nsn_insane_inherited(program.insane)) {
        nsn_insane_close(program.insane, 0);
        program.insane = NULL;
    }
    if (program.insane)
        result = NSN_ERROR_ALREADY_INITIALIZED;
    else
        result = told("nsn_init", open_program());
    pthread_mutex_unlock(&program.lock);
    return result;
}

int nsn_close(void)
{
    pthread_mutex_lock(&program.lock);
    struct nsn_insane *insane = program.insane;
    int result = insane ? 0 : NSN_ERROR_NOT_INITIALIZED;
    if (insane) {
        pass_warning_on(insane);
        result = nsn_insane_close(insane, CLOSE_NS);
        if (result == 0)
            __atomic_store_n(&program.insane, NULL, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&program.lock);
    return told("nsn_close", result);
}

/* --- setting up --------------------------------------------------------------------------------------------------- */

nsn_stream_t nsn_create_stream(nsn_options_t opts)
{
    struct nsn_insane *insane = session();
    nsn_stream_t stream;
    int result = insane ? nsn_insane_create_stream(insane, &opts, &stream) : -ENOTCONN;
    return told("nsn_create_stream", result) < 0 ? NSN_INVALID_STREAM_HANDLE : stream;
}

int nsn_destroy_stream(nsn_stream_t stream)
{
    struct nsn_insane *insane = session();
    return insane ? nsn_insane_destroy_stream(insane, stream) : NSN_ERROR_NOT_INITIALIZED;
}

nsn_source_t nsn_create_source(nsn_stream_t stream, uint32_t source_id)
{
    struct nsn_insane *insane = session();
    nsn_source_t source;
    int result = insane ? nsn_insane_create_source(insane, stream, source_id, &source) : -ENOTCONN;
    return told("nsn_create_source", result) < 0 ? NSN_INVALID_SRC : source;
}

int nsn_destroy_source(nsn_source_t source)
{
    struct nsn_insane *insane = session();
    return insane ? nsn_insane_destroy_source(insane, source) : NSN_ERROR_NOT_INITIALIZED;
}

nsn_sink_t nsn_create_sink(nsn_stream_t stream, uint32_t sink_id, handle_data_cb cb)
{
    struct nsn_insane *insane = session();
    nsn_sink_t sink;
    int result = insane ? nsn_insane_create_sink(insane, stream, sink_id, cb, &sink) : -ENOTCONN;
    if (insane)
        pass_warning_on(insane);
    return told("nsn_create_sink", result) < 0 ? NSN_INVALID_SNK : sink;
}

int nsn_destroy_sink(nsn_sink_t sink)
{
    struct nsn_insane *insane = session();
    if (!insane)
        return NSN_ERROR_NOT_INITIALIZED;
    pass_warning_on(insane);
    return nsn_insane_destroy_sink(insane, sink);
}

/* --- messages ----------------------------------------------------------------------------------------------------- */

nsn_buffer_t *nsn_get_buffer(size_t size, int flags)
{
    struct nsn_insane *insane = session();
    nsn_buffer_t *buffer;
    uint64_t wait_ns = insane && flags & NSN_BLOCKING ? nsn_insane_write_deadline(insane) : 0;
    int result = insane ? nsn_insane_get_buffer(insane, size, wait_ns, &buffer) : -ENOTCONN;
    return result < 0 ? no_buffer(result) : buffer;
}

int nsn_emit_data(nsn_source_t source, nsn_buffer_t *buf)
{
    struct nsn_insane *insane = session();
    if (!insane)
        return -ENOTCONN;
    uint64_t deadline = 0;
    int result;
    while ((result = nsn_insane_emit(insane, source, buf, deadline)) == -EINTR)
        if (!deadline)
            deadline = nsn_now_ns() + nsn_insane_write_deadline(insane);
    pass_warning_on(insane);
    return result;
}

int nsn_check_emit_outcome(nsn_source_t source, int id)
{
    struct nsn_insane *insane = session();
    return insane ? nsn_insane_outcome(insane, source, id) : -ENOTCONN;
}

int nsn_data_available(nsn_sink_t sink, int flags)
{
    struct nsn_insane *insane = session();
    return insane ? nsn_insane_available(insane, sink, flags & NSN_BLOCKING ? UINT64_MAX : 0) : -ENOTCONN;
}

nsn_buffer_t *nsn_consume_data(nsn_sink_t sink, int flags)
{
    struct nsn_insane *insane = session();
    nsn_buffer_t *buffer;
    int result = insane ? nsn_insane_consume(insane, sink, flags & NSN_BLOCKING ? UINT64_MAX : 0, 0, &buffer) : -ENOTCONN;
    if (insane)
        pass_warning_on(insane);
    return result < 0 ? no_buffer(result) : buffer;
}

int nsn_release_data(nsn_buffer_t *buf)
{
    struct nsn_insane *insane = session();
    return insane ? nsn_insane_release(insane, buf) : -ENOTCONN;
}

uint64_t nsn_sink_dropped(nsn_sink_t sink)
{
    struct nsn_insane *insane = session();
    return insane ? nsn_insane_dropped(insane, sink) : 0;
}
