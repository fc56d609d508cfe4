/* Publishes readings on channel 12 until it is stopped, or as many as are given: `pub [COUNT]`. See sub.c and sub.py; any
 * NATS client with this port hears them as the subject $INSANE.12.
 *
 *     gcc pub.c -o pub $(insane-nats config --cflags --libs)
 */
#include <nsn/nsn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define CHANNEL 12
#define SIZE 64

static int publish(nsn_source_t source, long number)
{
    nsn_buffer_t *buffer = nsn_get_buffer(SIZE, NSN_BLOCKING);
    if (!nsn_buffer_is_valid(buffer))
        return -1;
    buffer->len = (size_t)snprintf((char *)buffer->data, SIZE, "reading %ld", number);
    int token = nsn_emit_data(source, buffer);
    return token < 0 ? -1 : nsn_check_emit_outcome(source, token);
}

int main(int count, char **words)
{
    long most = count > 1 ? atol(words[1]) : -1;
    if (nsn_init() < 0)
        return 1;
    nsn_options_t options = {NSN_QOS_DATAPATH_DEFAULT, NSN_QOS_CONSUMPTION_LOW, NSN_QOS_DETERMINISM_DEFAULT,
                             NSN_QOS_RELIABILITY_RELIABLE};
    nsn_source_t source = nsn_create_source(nsn_create_stream(options), CHANNEL);
    int outcome = source == NSN_INVALID_SRC ? -1 : 0;
    for (long number = 0; outcome >= 0 && number != most;) {
        outcome = publish(source, number);
        if (outcome > 0)
            number++;
        else
            nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL); /* nobody listens yet */
    }
    if (outcome < 0)
        fprintf(stderr, "pub: %s\n", nsn_error_text());
    nsn_close();
    return outcome < 0;
}
