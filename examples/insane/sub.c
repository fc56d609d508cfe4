/* Prints what is published on channel 12, by a callback: `sub [COUNT]`. See pub.c and pub.py.
 *
 *     gcc sub.c -o sub $(insane-nats config --cflags --libs)
 */
#include <nsn/nsn.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>

#define CHANNEL 12

static long left;
static sem_t done;

/* Runs in the library's thread. The buffer is ours now: it goes back by nsn_release_data. */
static void print(nsn_sink_t sink, nsn_buffer_t *buffer)
{
    (void)sink;
    if (left) {
        printf("%.*s\n", (int)buffer->len, (const char *)buffer->data);
        if (--left == 0)
            sem_post(&done);
    }
    nsn_release_data(buffer);
}

int main(int count, char **words)
{
    left = count > 1 ? atol(words[1]) : -1;
    sem_init(&done, 0, 0);
    if (nsn_init() < 0)
        return 1;
    nsn_options_t options = {NSN_QOS_DATAPATH_DEFAULT, NSN_QOS_CONSUMPTION_LOW, NSN_QOS_DETERMINISM_DEFAULT,
                             NSN_QOS_RELIABILITY_RELIABLE};
    nsn_sink_t sink = nsn_create_sink(nsn_create_stream(options), CHANNEL, (handle_data_cb)print);
    if (sink == NSN_INVALID_SNK)
        return 1;
    while (sem_wait(&done) < 0)
        ;
    nsn_close();
    return 0;
}
